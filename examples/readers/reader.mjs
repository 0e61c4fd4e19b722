// Reads maskcast's messages (docs/wire.md) and prints one JSON line per frame: the area of each mask,
// and the keypoints (x, y, score) if poses are estimated. Malformed messages are reported and skipped.
//
//   npm install zeromq @msgpack/msgpack
//   node reader.mjs tcp://127.0.0.1:5555             until a source has ended
//   node reader.mjs ../../tests/golden/instances_crop_u8.json
import { readFileSync } from "node:fs";
import { decode } from "@msgpack/msgpack";

const f = Math.fround; // step 2 is computed in float32

// From a crop to pixels: a border of zeros, a grown box, bilinear with half-pixel centres.
function paste(crop, box, width, height) {
  const grow = f(30 / 28);
  const grown = (low, high) => {
    const centre = f(f(low + high) * 0.5), half = f(f(f(high - low) * 0.5) * grow);
    return [Math.trunc(f(centre - half)), Math.trunc(f(centre + half))];
  };
  const [x1, x2] = grown(box[0], box[2]), [y1, y2] = grown(box[1], box[3]);
  const w = Math.max(x2 - x1 + 1, 1), h = Math.max(y2 - y1 + 1, 1);
  const cell = (r, c) => (r < 1 || r > 28 || c < 1 || c > 28 ? 0 : crop[28 * (r - 1) + c - 1]);
  const place = (i, size) => Math.min(Math.max((30 * (i + 0.5)) / size - 0.5, 0), 29);
  const mask = new Uint8Array(width * height);
  for (let y = Math.max(y1, 0); y < Math.min(y1 + h, height); y++) {
    const v = place(y - y1, h), r = Math.floor(v), dv = v - r;
    for (let x = Math.max(x1, 0); x < Math.min(x1 + w, width); x++) {
      const u = place(x - x1, w), c = Math.floor(u), du = u - c;
      const top = cell(r, c) * (1 - du) + cell(r, c + 1) * du;
      const bottom = cell(r + 1, c) * (1 - du) + cell(r + 1, c + 1) * du;
      mask[y * width + x] = top * (1 - dv) + bottom * dv > 127.5 ? 1 : 0;
    }
  }
  return mask;
}

function runLengths(code, width, height) {
  const mask = new Uint8Array(width * height), runs = [];
  let at = 0, pixel = 0;
  while (at < code.length) {
    let value = 0, scale = 1, group;
    do {
      require(at < code.length && code[at] >= 48 && code[at] < 112, "a run length");
      group = code[at++] - 48;
      value += (group & 31) * scale;
      scale *= 32;
    } while (group & 32);
    if (group & 16) value -= scale;
    if (runs.length > 2) value += runs[runs.length - 2];
    require(value >= 0 && pixel + value <= mask.length, "a run length");
    for (let i = 0; i < value; i++, pixel++) // down the columns
      mask[(pixel % height) * width + Math.floor(pixel / height)] = runs.length % 2;
    runs.push(value);
  }
  require(pixel === mask.length, "run lengths that do not fill the frame");
  return mask;
}

function flipRing(mask, ring, width, height) { // even-odd: each ring flips what lies inside it
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      let inside = false;
      for (let i = 0, j = ring.length - 1; i < ring.length; j = i++) {
        const [ax, ay] = ring[i], [bx, by] = ring[j];
        if (ay > y + 0.5 !== by > y + 0.5 && x + 0.5 < ((bx - ax) * (y + 0.5 - ay)) / (by - ay) + ax)
          inside = !inside;
      }
      mask[y * width + x] ^= inside;
    }
}

function readMasks(header, arrays, part) {
  const { width, height, count, masks: format } = header;
  const view = new DataView(part.buffer, part.byteOffset, part.byteLength);
  const boxes = new DataView(arrays.buffer, arrays.byteOffset, arrays.byteLength);
  const uint = (at) => view.getUint32(at, true);
  const masks = [];
  let code = 4 * count, ring = 4 * count, points = 4 * count;
  if (format === "polygon") for (let i = 0; i < count; i++) points += 4 * uint(4 * i);
  for (let i = 0; i < count && format !== "none"; i++) {
    const box = [0, 4, 8, 12].map((k) => boxes.getFloat32(16 * i + k, true));
    if (format === "crop_u8") {
      masks.push(paste(part.subarray(784 * i, 784 * (i + 1)), box, width, height));
    } else if (format === "crop_bits") {
      const bit = (_, b) => ((part[98 * i + (b >> 3)] >> (7 - (b % 8))) & 1 ? 255 : 0);
      masks.push(paste(Array.from({ length: 784 }, bit), box, width, height));
    } else if (format === "coco_rle") {
      masks.push(runLengths(part.subarray(code, code + uint(4 * i)), width, height));
      code += uint(4 * i);
    } else if (format === "polygon") {
      const mask = new Uint8Array(width * height);
      for (let rings = uint(4 * i); rings > 0; rings--, ring += 4) {
        const corners = [];
        for (let n = uint(ring); n > 0; n--, points += 8)
          corners.push([view.getFloat32(points, true), view.getFloat32(points + 4, true)]);
        flipRing(mask, corners, width, height);
      }
      masks.push(mask);
    }
  }
  return masks;
}

function readKeypoints(names, count, part) {
  const view = new DataView(part.buffer, part.byteOffset, part.byteLength);
  const k = names.length;
  require(part.length === 12 * k * count, "the length of part 5");
  const point = (at) => [0, 4, 8].map((offset) => view.getFloat32(at + offset, true));
  return Array.from({ length: count }, (_, i) =>
    Array.from({ length: k }, (_, j) => point(12 * (k * i + j))),
  );
}

function require(isTrue, what) {
  if (!isTrue) throw new Error(`malformed message: ${what}`);
}

// Strings are decoded here, because the package takes bytes that are not UTF-8.
function text(value) {
  if (value instanceof Uint8Array) return new TextDecoder("utf-8", { fatal: true }).decode(value);
  if (Array.isArray(value)) return value.map(text);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, text(inner)]));
}

function readHeader(parts) {
  const topic = /^v1\/[A-Za-z0-9][A-Za-z0-9._-]{0,63}\/(instances|event)$/.exec(parts[0].toString("latin1"));
  require(topic, "the topic");
  const isEvent = topic[1] === "event";
  require(parts.length >= (isEvent ? 2 : 4), "too few parts");
  // 64-bit integers become BigInt, since capture_ns exceeds 2^53; bytes behind the map are an error.
  const header = text(decode(parts[1], { useBigInt64: true, rawStrings: true }));
  require(header !== null && typeof header === "object" && !Array.isArray(header), "the header");
  require(/^[0-9a-f]{16}$/.test(header.publisher), "publisher");
  const numbers = ["seq", "publish_ns"];
  if (!isEvent) numbers.push("index", "capture_ns", "width", "height", "count");
  for (const key of numbers) {
    const value = header[key];
    require(["bigint", "number"].includes(typeof value) && value >= 0, key);
    require(typeof value === "bigint" || Number.isInteger(value), key);
  }
  if (isEvent) return { ...header, isEvent };
  for (const key of ["width", "height"]) require(header[key] >= 1 && header[key] <= 16384, key);
  require(["none", "crop_u8", "crop_bits", "coco_rle", "polygon"].includes(header.masks), "masks");
  const each = header.arrays?.includes("track_ids") ? 28n : 24n;
  require(BigInt(header.count) * each <= BigInt(parts[2].length), "part 2 is too short");
  for (const key of ["width", "height", "count", "index"]) header[key] = Number(header[key]);
  return header;
}

// Numbers outside a range, and NaN, are refused.
function requireWithin(value, low, high, what) {
  require(value >= low && value <= high, what);
}

function checkArrays({ width, height, count }, part) {
  const view = new DataView(part.buffer, part.byteOffset, part.byteLength);
  for (let i = 0; i < count; i++) {
    const [x1, y1, x2, y2] = [0, 4, 8, 12].map((k) => view.getFloat32(16 * i + k, true));
    requireWithin(x1, 0, x2, "a box");
    requireWithin(x2, x1, width, "a box");
    requireWithin(y1, 0, y2, "a box");
    requireWithin(y2, y1, height, "a box");
    requireWithin(view.getFloat32(16 * count + 4 * i, true), 0, 1, "a score");
    require(view.getInt32(20 * count + 4 * i, true) >= 0, "a label");
  }
}

// The length of part 3 follows from the number of instances, or from the tables in it.
function checkMasks({ count, masks, width, height }, part) {
  const view = new DataView(part.buffer, part.byteOffset, part.byteLength);
  const table = (at) => {
    require(at + 4 <= part.length, "part 3 is too short");
    return view.getUint32(at, true);
  };
  let length = { none: 0, crop_u8: 784 * count, crop_bits: 98 * count }[masks] ?? 4 * count;
  if (masks === "coco_rle") for (let i = 0; i < count; i++) length += table(4 * i);
  if (masks === "polygon") {
    let rings = 0, points = 0;
    for (let i = 0; i < count; i++) rings += table(4 * i);
    for (let i = 0; i < rings; i++) {
      const corners = table(4 * (count + i));
      require(corners >= 3, "a ring");
      points += corners;
    }
    length += 4 * rings + 8 * points;
    require(part.length === length, "the length of part 3");
    for (let at = 4 * (count + rings); at < length; at += 8) {
      requireWithin(view.getFloat32(at, true), 0, width, "a point");
      requireWithin(view.getFloat32(at + 4, true), 0, height, "a point");
    }
  }
  require(part.length === length, "the length of part 3");
}

function checkKeypoints({ width, height, keypoints }, poses) {
  for (const ends of keypoints.skeleton ?? [])
    for (const end of ends) requireWithin(Number(end), 0, keypoints.names.length - 1, "skeleton");
  for (const [x, y, score] of poses.flat()) {
    requireWithin(x, 0, width, "a keypoint");
    requireWithin(y, 0, height, "a keypoint");
    requireWithin(score, 0, 1, "a keypoint's score");
  }
}

// Returns false when the message says that its source has ended.
function show(parts) {
  const header = readHeader(parts);
  if (header.isEvent) return header.event !== "ended";
  checkArrays(header, parts[2]);
  checkMasks(header, parts[3]);
  const areas = readMasks(header, parts[2], parts[3]).map((m) => m.reduce((a, b) => a + b, 0));
  const shown = { index: header.index, areas };
  if (header.arrays?.includes("keypoints")) {
    require(header.keypoints?.names && parts.length > 5, "keypoints without names or part 5");
    shown.keypoints = readKeypoints(header.keypoints.names, header.count, parts[5]);
    checkKeypoints(header, shown.keypoints);
  }
  console.log(JSON.stringify(shown));
  return true;
}

const where = process.argv[2] ?? "tcp://127.0.0.1:5555";

// Messages of a later version, or of a faulty publisher, must not end the reader.
function tryToShow(parts) {
  try {
    return show(parts);
  } catch (error) {
    console.error(error.message);
    return null;
  }
}

if (!where.includes("://")) {
  const parts = JSON.parse(readFileSync(where)).parts.map((hex) => Buffer.from(hex, "hex"));
  process.exitCode = tryToShow(parts) === null ? 1 : 0;
} else {
  const { Subscriber } = await import("zeromq");
  const socket = new Subscriber({ receiveHighWaterMark: 10000 });
  socket.connect(where);
  socket.subscribe("v1/");
  for await (const parts of socket) if (tryToShow(parts) === false) break;
  socket.close();
}
