// Masks: from 28x28 crops to pixels, by the rule of docs/wire.md ("From a crop to pixels").

const SIDE = 28;
const CELLS = SIDE + 2; // with a border of zeros, one cell wide
const HALF = 127.5;
const f32 = Math.fround;
const GROWTH = f32(CELLS / SIDE);

/** The pixels that a padded crop covers; computed in float32, as the rule requires. */
export function maskGrid(x1, y1, x2, y2) {
  const centreX = f32(f32(x2 + x1) * 0.5);
  const centreY = f32(f32(y2 + y1) * 0.5);
  const halfWidth = f32(f32(f32(x2 - x1) * 0.5) * GROWTH);
  const halfHeight = f32(f32(f32(y2 - y1) * 0.5) * GROWTH);
  const x = Math.trunc(f32(centreX - halfWidth));
  const y = Math.trunc(f32(centreY - halfHeight));
  return {
    x,
    y,
    width: Math.max(Math.trunc(f32(centreX + halfWidth)) - x + 1, 1),
    height: Math.max(Math.trunc(f32(centreY + halfHeight)) - y + 1, 1),
  };
}

/** For each pixel, the cell before it and the distance to that cell, in cells. */
function positions(first, count, start, size) {
  const cells = new Uint8Array(count);
  const fractions = new Float64Array(count);
  for (let i = 0; i < count; i++) {
    const at = ((first + i - start + 0.5) * CELLS) / size - 0.5;
    const position = Math.min(Math.max(at, 0), CELLS - 1);
    cells[i] = Math.min(Math.floor(position), CELLS - 2);
    fractions[i] = position - cells[i];
  }
  return { cells, fractions };
}

/**
 * Turn a crop into the pixels of its mask.
 *
 * Returns { x, y, width, height, pixels }: pixels is 1 inside the object and 0 outside, row by row.
 */
export function pasteMask(crop, box, frameWidth, frameHeight) {
  const grid = maskGrid(...box);
  const x = Math.max(grid.x, 0);
  const y = Math.max(grid.y, 0);
  const width = Math.max(Math.min(grid.x + grid.width, frameWidth) - x, 0);
  const height = Math.max(Math.min(grid.y + grid.height, frameHeight) - y, 0);
  const pixels = new Uint8Array(width * height);
  const cells = new Float64Array(CELLS * CELLS);
  for (let row = 0; row < SIDE; row++) {
    for (let column = 0; column < SIDE; column++) {
      cells[(row + 1) * CELLS + column + 1] = crop[row * SIDE + column];
    }
  }
  const across = positions(x, width, grid.x, grid.width);
  const down = positions(y, height, grid.y, grid.height);
  const profile = new Float64Array(CELLS);
  for (let j = 0, k = 0; j < height; j++) {
    const above = down.cells[j] * CELLS;
    for (let c = 0; c < CELLS; c++) {
      const value = cells[above + c];
      profile[c] = value + (cells[above + CELLS + c] - value) * down.fractions[j];
    }
    for (let i = 0; i < width; i++, k++) {
      const c = across.cells[i];
      const value = profile[c];
      if (value + (profile[c + 1] - value) * across.fractions[i] > HALF) pixels[k] = 1;
    }
  }
  return { x, y, width, height, pixels };
}

/** Set the outline of a mask to 2: pixels with a neighbour outside, in `thickness` passes. */
export function markOutline({ width, height, pixels }, thickness) {
  const edge = [];
  for (let turn = 0; turn < thickness; turn++) {
    edge.length = 0;
    for (let y = 0, k = 0; y < height; y++) {
      for (let x = 0; x < width; x++, k++) {
        if (pixels[k] !== 1) continue;
        const inside =
          x > 0 && x < width - 1 && y > 0 && y < height - 1 &&
          pixels[k - 1] === 1 && pixels[k + 1] === 1 &&
          pixels[k - width] === 1 && pixels[k + width] === 1;
        if (!inside) edge.push(k);
      }
    }
    for (const k of edge) pixels[k] = 2;
  }
}
