// GroupedNms: non-maximum suppression of unsorted candidates, within groups, for a batch of images.
//
// The reference is torchvision.ops.batched_nms (one greedy pass per group), limited to the best
// `max_output`. Three kernels on one stream; nothing returns to the host, there are no atomics, and
// results are bit-identical on every device: products are rounded where torchvision rounds them (no
// fused multiply-add).
//
//   nms_rank     finds each candidate's position in descending order: the number of better ones.
//   nms_overlap  finds the later candidates of its group that each candidate overlaps, as bits.
//   nms_select   goes through the order, 64 candidates per step, and keeps a candidate if no kept
//                one overlaps it.
//
// Cost per image for N = 5000 (RPN) / 2000 (boxes), words = ceil(N / 64):
//   nms_rank     N^2 comparisons, 4 instructions each: 100 M / 16 M. Counting beats a sort of this
//                size: one launch, no passes over memory, N / 32 blocks busy instead of one.
//                floor L4 (58 SM, 15 T instructions/s) 6.6 / 1.1 us, RTX 4090 (41 T/s) 2.4 / 0.4 us
//   nms_overlap  N^2 / 2 intersections of about 36 instructions (counted in sm_89 code): 450 M / 72 M;
//                the division is only for pairs that intersect;
//                writes N * words * 8 / 2 bytes = 1.6 / 0.26 MB, which stay in L2
//                floor L4 30 / 4.8 us, RTX 4090 11 / 1.8 us
//   nms_select   a chain of N / 64 = 79 / 32 steps, one block per image; reads the kept rows,
//                at most 1.6 / 0.26 MB from L2. The chain limits it, not the bytes: about 1500 cycles
//                per step (two barriers, 64 words from L2, a loop in shared memory) make 60 / 25 us.
// Candidates at or below the score threshold cost only the rank. Not measured on a GPU.
#include "arguments.h"
#include "device.cuh"

namespace maskcast {

constexpr int kRankRows = 32;     // candidates that a block of nms_rank places
constexpr int kRankSlices = 8;    // threads that share the counting for one candidate
constexpr int kRankTile = kRankRows * kRankSlices;
constexpr int kOverlapTiles = 4;  // words per row that a block of nms_overlap fills
constexpr int kSelectWords = kMaxCandidates / kWord;
constexpr int kSelectSlices = 4;

__device__ __forceinline__ int words_of(int candidates) { return (candidates + kWord - 1) / kWord; }

// A larger key is a better candidate: score first, then the lower index. The upper half is 0 for a
// candidate that may not be kept; -0 counts as +0, as in a comparison of floats.
__device__ __forceinline__ uint64_t key_of(float score, float threshold, int index) {
  uint32_t rank = 0;
  if (score > threshold) {
    const uint32_t bits = __float_as_uint(score + 0.f);
    rank = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  return static_cast<uint64_t>(rank) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

// The arithmetic of torchvision's nms, rounding by rounding. 0 / 0 is NaN and suppresses nothing.
__device__ __forceinline__ bool overlap(const float4& a, const float4& b, float threshold) {
  const float width = fmaxf(fminf(a.z, b.z) - fmaxf(a.x, b.x), 0.f);
  const float height = fmaxf(fminf(a.w, b.w) - fmaxf(a.y, b.y), 0.f);
  const float both = __fmul_rn(width, height);
  const float area_a = __fmul_rn(a.z - a.x, a.w - a.y);
  const float area_b = __fmul_rn(b.z - b.x, b.w - b.y);
  // Most pairs do not intersect, and a division with numerator 0 takes the slow path: skip it. The
  // result is the same, since 0 / union is 0 or NaN and no threshold is negative.
  return both > 0.f && both / (area_a + area_b - both) > threshold;
}

}  // namespace maskcast

// grid (ceil(candidates / 32), images), block (32, 8)
extern "C" __global__ void nms_rank(const __grid_constant__ maskcast::NmsArguments a) {
  using namespace maskcast;
  __shared__ uint64_t keys[kRankTile];
  __shared__ int betters[kRankSlices][kRankRows];

  const int row = static_cast<int>(threadIdx.x), slice = static_cast<int>(threadIdx.y);
  const int candidate = static_cast<int>(blockIdx.x) * kRankRows + row;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * a.candidates;
  const float* scores = a.scores + first;
  const bool exists = candidate < a.candidates;
  const uint64_t own = exists ? key_of(__ldg(scores + candidate), a.score_threshold, candidate) : 0;

  int count = 0;
  for (int tile = 0; tile < a.candidates; tile += kRankTile) {
    const int other = tile + slice * kRankRows + row;
    keys[slice * kRankRows + row] =
        other < a.candidates ? key_of(__ldg(scores + other), a.score_threshold, other) : 0;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kRankRows; ++k) count += keys[slice * kRankRows + k] > own;
    __syncthreads();
  }
  betters[slice][row] = count;
  __syncthreads();
  if (slice != 0 || !exists) return;

  int rank = 0;
  for (int s = 0; s < kRankSlices; ++s) rank += betters[s][row];
  const bool eligible = (own >> 32) != 0;
  a.order[first + rank] = eligible ? candidate : -1;
  a.sorted_groups[first + rank] = __ldg(a.groups + first + candidate);
  reinterpret_cast<float4*>(a.sorted_boxes)[first + rank] =
      __ldg(reinterpret_cast<const float4*>(a.boxes) + first + candidate);
}

// grid (ceil(words / 4), words, images), block (64, 4). Only words on and right of the diagonal are
// written, and only in rows of eligible candidates: nms_select reads no others.
extern "C" __global__ void nms_overlap(const __grid_constant__ maskcast::NmsArguments a) {
  using namespace maskcast;
  __shared__ float4 boxes[kOverlapTiles][kWord];
  __shared__ int32_t groups[kOverlapTiles][kWord];

  const int words = words_of(a.candidates);
  const int lane = static_cast<int>(threadIdx.x), tile = static_cast<int>(threadIdx.y);
  const int row_word = static_cast<int>(blockIdx.y);
  const int first_word = static_cast<int>(blockIdx.x) * kOverlapTiles;
  const int64_t first = static_cast<int64_t>(blockIdx.z) * a.candidates;
  if (first_word + kOverlapTiles <= row_word) return;  // left of the diagonal, the whole block
  if (a.order[first + row_word * kWord] < 0) return;   // nothing eligible here or after

  const float4* sorted_boxes = reinterpret_cast<const float4*>(a.sorted_boxes) + first;
  const int32_t* sorted_groups = a.sorted_groups + first;
  const int word = first_word + tile;
  const int column = word * kWord + lane;
  if (column < a.candidates) {
    boxes[tile][lane] = sorted_boxes[column];
    groups[tile][lane] = sorted_groups[column];
  }
  __syncthreads();

  const int row = row_word * kWord + lane;
  if (row >= a.candidates || word < row_word || word >= words) return;
  const float4 own = sorted_boxes[row];
  const int32_t own_group = sorted_groups[row];
  const int columns = min(kWord, a.candidates - word * kWord);
  uint64_t bits = 0;
  for (int k = word == row_word ? lane + 1 : 0; k < columns; ++k) {
    if (groups[tile][k] == own_group && overlap(own, boxes[tile][k], a.iou_threshold)) {
      bits |= uint64_t{1} << k;
    }
  }
  a.overlaps[(first + row) * words + word] = bits;
}

// grid (images), block (512): 128 words x 4 slices. Each slice gathers a quarter of the kept rows into
// its own copy of the removed bits, so no two threads write the same word.
extern "C" __global__ void nms_select(const __grid_constant__ maskcast::NmsArguments a) {
  using namespace maskcast;
  __shared__ uint64_t removed[kSelectSlices][kSelectWords];
  __shared__ uint64_t diagonal[kWord];
  __shared__ uint64_t step_kept;

  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kSelectWords, slice = thread / kSelectWords;
  const int words = words_of(a.candidates);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * a.candidates;
  const int32_t* order = a.order + first;
  const uint64_t* overlaps = a.overlaps + first * words;
  int32_t* keep = a.keep + static_cast<int64_t>(blockIdx.x) * a.max_output;

  int eligible = 0;  // number of eligible candidates: where the first -1 is, by bisection
  for (int end = a.candidates; eligible < end;) {
    const int middle = (eligible + end) / 2;
    if (order[middle] >= 0) {
      eligible = middle + 1;
    } else {
      end = middle;
    }
  }

  removed[slice][lane] = 0;
  int count = 0;
  for (int step = 0; step * kWord < eligible && count < a.max_output; ++step) {
    const int here = min(kWord, eligible - step * kWord);
    if (thread < here) {
      diagonal[thread] = overlaps[static_cast<int64_t>(step * kWord + thread) * words + step];
    }
    __syncthreads();
    if (thread == 0) {
      uint64_t open = here == kWord ? ~uint64_t{0} : (uint64_t{1} << here) - 1;
      for (int s = 0; s < kSelectSlices; ++s) open &= ~removed[s][step];
      uint64_t kept = 0;
      while (open) {
        const int best = __ffsll(static_cast<long long>(open)) - 1;
        kept |= uint64_t{1} << best;
        open &= ~(diagonal[best] | uint64_t{1} << best);
      }
      step_kept = kept;
    }
    __syncthreads();
    const uint64_t kept = step_kept;
    if (thread < here && (kept >> thread & 1)) {
      const int at = count + __popcll(kept & ((uint64_t{1} << thread) - 1));
      if (at < a.max_output) keep[at] = order[step * kWord + thread];
    }
    count += __popcll(kept);
    if (lane > step && lane * kWord < eligible) {
      uint64_t bits = removed[slice][lane];
#pragma unroll
      for (int j = 0; j < kWord / kSelectSlices; ++j) {  // a known count: all loads are in flight
        const int k = j * kSelectSlices + slice;
        if (kept >> k & 1) bits |= overlaps[static_cast<int64_t>(step * kWord + k) * words + lane];
      }
      removed[slice][lane] = bits;
    }
  }
  for (int at = min(count, a.max_output) + thread; at < a.max_output; at += kSelectWords * kSelectSlices) {
    keep[at] = -1;
  }
}
