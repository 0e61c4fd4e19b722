// Drawing: masks, boxes, skeletons and tags over a frame, in the colours of pipeline/outputs/draw.py.

import { markOutline, pasteMask } from "./masks.js";
import { readPolygons } from "./packet.js";

const FILL = 0.42; // opacity of masks
const TAG_TRIES = 6;
const TAG_CSS_PX = 12;
const SAME_INSTANCE_IOU = 0.3;
const VISIBLE = 0.3; // minimum score of a keypoint that is drawn
const LIMBS_PER_SIDE = 40; // the lines of a skeleton are at most 1 / this of its box's mean side wide
const EDGE = "rgb(16 16 16)";

/** Colour `number` of an endless series in which successive colours differ clearly: [r, g, b]. */
export function palette(number) {
  return colourOf((((0.56 + number * 0.618034) % 1) + 1) % 1, 0.78);
}

/** Colour of line `number` of a skeleton of `count` lines, in the order of the hues. */
export function limbColour(number, count) {
  return colourOf(number / count, 0.9);
}

function colourOf(hue, saturation) {
  const sector = Math.floor(hue * 6);
  const f = hue * 6 - sector;
  const p = 1 - saturation;
  const q = 1 - saturation * f;
  const t = 1 - saturation * (1 - f);
  const rgb = [[1, t, p], [q, 1, p], [p, 1, t], [p, q, 1], [t, p, 1], [1, p, q]][sector % 6];
  return rgb.map((value) => Math.round(255 * value));
}

/** Colour numbers of one source's instances: track ids, or those of overlapping boxes in the last frame. */
export class Colours {
  #boxes = [];
  #numbers = [];

  assign({ count, ids, boxes }) {
    if (ids) return Array.from(ids);
    const now = Array.from({ length: count }, (_, i) => boxes.subarray(4 * i, 4 * i + 4));
    const pairs = [];
    now.forEach((box, i) =>
      this.#boxes.forEach((last, j) => {
        const overlap = iou(box, last);
        if (overlap >= SAME_INSTANCE_IOU) pairs.push([overlap, i, j]);
      }),
    );
    pairs.sort((a, b) => b[0] - a[0]);
    const numbers = new Array(count).fill(-1);
    const taken = new Set();
    for (const [, i, j] of pairs) {
      if (numbers[i] >= 0 || taken.has(j)) continue;
      numbers[i] = this.#numbers[j];
      taken.add(j);
    }
    const used = new Set(numbers);
    let next = 0;
    for (let i = 0; i < count; i++) {
      if (numbers[i] >= 0) continue;
      while (used.has(next)) next++;
      numbers[i] = next;
      used.add(next);
    }
    this.#boxes = now.map((box) => Float32Array.from(box));
    this.#numbers = numbers;
    return numbers;
  }
}

function iou(a, b) {
  const width = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
  const height = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  if (width <= 0 || height <= 0) return 0;
  const common = width * height;
  return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common);
}

/**
 * Draw a frame.
 *
 * image: its image, or null. colours: a number for each instance. show: { masks, boxes, pose,
 * labels, score }. cssWidth: how wide the canvas is shown, so that tags stay legible in small canvases.
 */
export function drawFrame(canvas, frame, image, colours, show, cssWidth) {
  const { width, height } = frame;
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  const pen = canvas.getContext("2d");
  if (image) {
    pen.drawImage(image, 0, 0, width, height);
  } else {
    pen.fillStyle = "#1c1c1e";
    pen.fillRect(0, 0, width, height);
  }
  const shown = [];
  for (let i = 0; i < frame.count; i++) if (frame.scores[i] >= show.score) shown.push(i);
  const unit = Math.max(1, Math.round(Math.min(width, height) / 360));
  const rings =
    show.masks && frame.maskFormat === "polygons" ? readPolygons(frame.masks, frame.count) : null;
  for (const i of shown.toReversed()) { // highest score on top
    const colour = palette(colours[i]);
    const box = frame.boxes.subarray(4 * i, 4 * i + 4);
    if (rings) {
      drawRings(pen, rings[i], colour, unit);
    } else if (show.masks && frame.maskFormat === "crops") {
      drawCrop(pen, pasteMask(frame.masks.subarray(784 * i, 784 * (i + 1)), box, width, height), colour, unit);
    }
    if (show.boxes) {
      pen.strokeStyle = css(colour);
      pen.lineWidth = unit;
      const [x1, y1, x2, y2] = box;
      const inset = unit / 2;
      pen.strokeRect(x1 + inset, y1 + inset, Math.max(x2 - x1 - unit, 0), Math.max(y2 - y1 - unit, 0));
    }
    if (show.pose && frame.keypoints) drawSkeleton(pen, frame, i, unit);
  }
  if (show.labels) drawTags(pen, frame, shown, colours, cssWidth);
}

const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;
let scratch = null;
let bytes = new Uint8ClampedArray(0);

/** Draw one mask over the image: its area translucent, its outline solid. */
function drawCrop(pen, mask, colour, unit) {
  const { x, y, width, height, pixels } = mask;
  if (!width || !height) return;
  markOutline(mask, unit);
  if (bytes.length < 4 * pixels.length) bytes = new Uint8ClampedArray(4 * pixels.length);
  const rgba = bytes.subarray(0, 4 * pixels.length);
  const words = new Uint32Array(rgba.buffer, 0, pixels.length);
  const rgb = colour[0] | (colour[1] << 8) | (colour[2] << 16); // little-endian RGBA
  const values = [0, (rgb | (Math.floor(255 * FILL) << 24)) >>> 0, (rgb | (255 << 24)) >>> 0];
  for (let k = 0; k < pixels.length; k++) words[k] = values[pixels[k]];
  scratch ??= new OffscreenCanvas(1, 1);
  if (scratch.width < width) scratch.width = width;
  if (scratch.height < height) scratch.height = height;
  scratch.getContext("2d").putImageData(new ImageData(rgba, width, height), 0, 0);
  pen.drawImage(scratch, 0, 0, width, height, x, y, width, height);
}

function drawRings(pen, rings, colour, unit) {
  const path = new Path2D();
  for (const ring of rings) {
    for (let k = 0; k < ring.length; k += 2) path.lineTo(ring[k], ring[k + 1]);
    path.closePath();
  }
  pen.fillStyle = `rgb(${colour.join(" ")} / ${FILL})`;
  pen.fill(path, "evenodd");
  pen.strokeStyle = css(colour);
  pen.lineWidth = unit;
  pen.stroke(path);
}

/** Draw the visible keypoints of instance `i` and the lines between them, with dark edges. */
function drawSkeleton(pen, { boxes, keypoints, points, skeleton }, i, unit) {
  const [x1, y1, x2, y2] = boxes.subarray(4 * i, 4 * i + 4);
  const side = Math.sqrt((x2 - x1) * (y2 - y1));
  const width = Math.max(1, Math.min(3 * unit, Math.round(side / LIMBS_PER_SIDE)));
  const at = (k) => keypoints.subarray(3 * (points * i + k), 3 * (points * i + k + 1));
  const lines = [...skeleton.entries()].filter(([, pair]) => pair.every((k) => at(k)[2] >= VISIBLE));
  const stroke = (pairs, lineWidth, styleOf) => {
    pen.lineWidth = lineWidth;
    for (const [number, [a, b]] of pairs) {
      pen.strokeStyle = styleOf(number);
      pen.beginPath();
      pen.moveTo(at(a)[0], at(a)[1]);
      pen.lineTo(at(b)[0], at(b)[1]);
      pen.stroke();
    }
  };
  stroke(lines, width + 2, () => EDGE);
  stroke(lines, width, (number) => css(limbColour(number, skeleton.length)));
  for (let k = 0; k < points; k++) {
    const [x, y, score] = at(k);
    if (score < VISIBLE) continue;
    for (const [radius, colour] of [[0.7 * width + 1, EDGE], [0.7 * width, "white"]]) {
      pen.fillStyle = colour;
      pen.beginPath();
      pen.arc(x, y, radius, 0, 2 * Math.PI);
      pen.fill();
    }
  }
}

/** Text of the tag of instance `i`: "#7 person 93%". */
export function tagText(frame, i) {
  const name = frame.names[frame.labels[i]] ?? `label ${frame.labels[i]}`;
  const id = frame.ids && frame.ids[i] ? `#${frame.ids[i]} ` : "";
  return `${id}${name} ${Math.round(100 * frame.scores[i])}%`;
}

function drawTags(pen, frame, shown, colours, cssWidth) {
  const { width, height } = frame;
  const scale = cssWidth > 0 ? width / cssWidth : 1;
  const size = Math.round(Math.max(11, Math.min(width, height) / 40, TAG_CSS_PX * scale));
  const pad = Math.max(2, Math.round(size / 5));
  const tagHeight = size + 2 * pad;
  pen.font = `${size}px system-ui, sans-serif`;
  pen.textBaseline = "middle";
  const placed = [];
  for (const i of shown) { // by score: the highest gets the position at its box
    const text = tagText(frame, i);
    const colour = palette(colours[i]);
    const tagWidth = pen.measureText(text).width + 2 * pad;
    const [x1, y1] = frame.boxes.subarray(4 * i, 4 * i + 2);
    const left = Math.min(Math.max(0, x1), Math.max(0, width - tagWidth));
    const tops = y1 >= tagHeight ? [y1 - tagHeight] : [];
    for (let step = 0; step < TAG_TRIES; step++) tops.push(Math.max(0, y1) + step * (tagHeight + 1));
    const isFree = (top) =>
      top + tagHeight <= height &&
      !placed.some((p) => left < p.right && p.left < left + tagWidth && top < p.bottom && p.top < top + tagHeight);
    const top = tops.find(isFree) ?? tops[0];
    placed.push({ left, top, right: left + tagWidth, bottom: top + tagHeight });
    pen.fillStyle = css(colour);
    pen.fillRect(left, top, tagWidth, tagHeight);
    const [r, g, b] = colour;
    pen.fillStyle = 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "black" : "white"; // luma, BT.601
    pen.fillText(text, left + pad, top + tagHeight / 2);
  }
}
