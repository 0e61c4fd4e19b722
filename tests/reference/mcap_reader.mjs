// Prints the messages of an MCAP file with Foxglove's own reader, one JSON object per line.
import { createHash } from "node:crypto";
import { open } from "node:fs/promises";
import { McapIndexedReader } from "@mcap/core";
import { decompress } from "fzstd";

const file = await open(process.argv[2], "r");
const readable = {
  size: async () => BigInt((await file.stat()).size),
  read: async (offset, length) => {
    const buffer = new Uint8Array(Number(length));
    await file.read(buffer, 0, Number(length), Number(offset));
    return buffer;
  },
};
const reader = await McapIndexedReader.Initialize({
  readable,
  decompressHandlers: { zstd: (data, size) => decompress(data, new Uint8Array(Number(size))) },
});
for await (const message of reader.readMessages()) {
  const { topic, messageEncoding } = reader.channelsById.get(message.channelId);
  const { sequence, logTime, publishTime, data } = message;
  const sha256 = createHash("sha256").update(data).digest("hex");
  const times = { logTime: String(logTime), publishTime: String(publishTime) };
  console.log(JSON.stringify({ topic, messageEncoding, sequence, ...times, sha256 }));
}
await file.close();
