// Reads maskcast's messages (docs/wire.md) and prints one JSON line per frame: the area of each mask,
// and the keypoints (x, y, score) if poses are estimated.
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
      group = code[at++] - 48;
      value += (group & 31) * scale;
      scale *= 32;
    } while (group & 32);
    if (group & 16) value -= scale;
    if (runs.length > 2) value += runs[runs.length - 2];
    if (value < 0 || pixel + value > mask.length) throw new Error("runs are too long");
    for (let i = 0; i < value; i++, pixel++) // down the columns
      mask[(pixel % height) * width + Math.floor(pixel / height)] = runs.length % 2;
    runs.push(value);
  }
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
    } else {
      throw new Error(`unknown format of masks: ${format}`);
    }
  }
  return masks;
}

function readKeypoints(names, count, part) {
  const view = new DataView(part.buffer, part.byteOffset, part.byteLength);
  const k = names.length;
  if (part.length !== 12 * k * count) throw new Error("part 5 has a wrong length");
  const point = (at) => [0, 4, 8].map((offset) => view.getFloat32(at + offset, true));
  return Array.from({ length: count }, (_, i) =>
    Array.from({ length: k }, (_, j) => point(12 * (k * i + j))),
  );
}

// Returns false when the message says that its source has ended.
function show(parts) {
  const header = decode(parts[1], { useBigInt64: true }); // capture_ns exceeds 2^53
  if (parts[0].toString().endsWith("/event")) return header.event !== "ended";
  if (parts.length < 4) throw new Error("a message has too few parts");
  for (const key of ["width", "height", "count", "index"]) header[key] = Number(header[key]);
  const areas = readMasks(header, parts[2], parts[3]).map((m) => m.reduce((a, b) => a + b, 0));
  const shown = { index: header.index, areas };
  if (header.arrays?.includes("keypoints"))
    shown.keypoints = readKeypoints(header.keypoints.names, header.count, parts[5]);
  console.log(JSON.stringify(shown));
  return true;
}

const where = process.argv[2] ?? "tcp://127.0.0.1:5555";
if (!where.includes("://")) {
  show(JSON.parse(readFileSync(where)).parts.map((hex) => Buffer.from(hex, "hex")));
} else {
  const { Subscriber } = await import("zeromq");
  const socket = new Subscriber({ receiveHighWaterMark: 10000 });
  socket.connect(where);
  socket.subscribe("v1/");
  for await (const parts of socket) if (!show(parts)) break;
  socket.close();
}
