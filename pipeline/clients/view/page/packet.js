// Packets: frames as the server sends them (pipeline/clients/view/packet.py).

const decoder = new TextDecoder();

/** Read a packet from an ArrayBuffer. The arrays are views of it. */
export function readPacket(buffer) {
  const numbers = new DataView(buffer);
  const ageMs = numbers.getFloat64(0, true);
  const headerBytes = numbers.getUint32(8, true);
  const maskBytes = numbers.getUint32(12, true);
  const header = JSON.parse(decoder.decode(new Uint8Array(buffer, 16, headerBytes)));
  const n = header.count;
  let offset = 16 + headerBytes;
  const take = (Type, length) => {
    const array = new Type(buffer, offset, length);
    offset += array.byteLength;
    return array;
  };
  const boxes = take(Float32Array, 4 * n);
  const scores = take(Float32Array, n);
  const labels = take(Int32Array, n);
  const ids = header.ids ? take(Int32Array, n) : null;
  const keypoints = header.points ? take(Float32Array, 3 * header.points * n) : null;
  const masks = take(Uint8Array, maskBytes);
  const jpeg = take(Uint8Array, buffer.byteLength - offset);
  const arrays = { boxes, scores, labels, ids, keypoints, masks, jpeg };
  return { ...header, ageMs, maskFormat: header.masks, ...arrays };
}

/** Read the rings of every instance from masks of the format "polygons". */
export function readPolygons(masks, count) {
  const numbers = new DataView(masks.buffer, masks.byteOffset, masks.byteLength);
  const ringCounts = Array.from({ length: count }, (_, i) => numbers.getUint32(4 * i, true));
  const rings = ringCounts.reduce((sum, n) => sum + n, 0);
  let table = 4 * count;
  let offset = 4 * (count + rings);
  return ringCounts.map((n) =>
    Array.from({ length: n }, () => {
      const points = numbers.getUint32(table, true);
      table += 4;
      const ring = new Float32Array(2 * points);
      for (let k = 0; k < ring.length; k++, offset += 4) ring[k] = numbers.getFloat32(offset, true);
      return ring;
    }),
  );
}
