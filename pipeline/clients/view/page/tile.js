// Tile: one source on the page.

import { Colours, drawFrame } from "./draw.js";

const RATE_WINDOW_MS = 3000;
const SILENT_AFTER_MS = 3000;
const SILENT_AFTER_INTERVALS = 3; // for sources with a low frame rate
const MAX_SILENT_AFTER_MS = 60_000;

/** One source: its image, its state and its figures. */
export class Tile {
  #frame = null; // the frame that is drawn
  #image = null; // its image, an ImageBitmap
  #colours = new Colours();
  #numbers = [];
  #receivedMs = 0;
  #sent = []; // [publish_ms, seq] of the last seconds, of two frames at least
  #state = "";
  #parts;

  constructor(name, template, show, onOpen) {
    this.name = name;
    this.updatedMs = performance.now(); // when the view last sent a message about it
    this.element = template.content.firstElementChild.cloneNode(true);
    this.#parts = Object.fromEntries(
      [...this.element.querySelectorAll("[data-part]")].map((e) => [e.dataset.part, e]),
    );
    this.show = show;
    const { title, open, snapshot, canvas } = this.#parts;
    title.textContent = name;
    title.id = `source-${name}`;
    this.element.setAttribute("aria-labelledby", title.id);
    canvas.setAttribute("aria-label", `${name}: no frame yet`);
    snapshot.setAttribute("aria-label", `Save a snapshot of ${name} as PNG`);
    open.addEventListener("click", () => onOpen(this));
    snapshot.addEventListener("click", () => this.#save());
    this.setOpen(false);
    this.#showState();
  }

  /** Milliseconds since the last frame. */
  get silentMs() {
    return performance.now() - this.#receivedMs;
  }

  /** Show a packet; resolves when it is drawn. */
  async add(packet) {
    let image = null;
    if (packet.jpeg.length) {
      try {
        image = await createImageBitmap(new Blob([packet.jpeg], { type: "image/jpeg" }));
      } catch {
        image = null; // a malformed image: the masks are shown without it
      }
    }
    const last = this.#frame;
    const isOlder = last && last.publisher === packet.publisher && packet.seq <= last.seq;
    if (isOlder) {
      image?.close();
      return;
    }
    if (last && last.publisher !== packet.publisher) this.#sent = [];
    this.#image?.close();
    this.#image = image;
    this.#frame = packet;
    this.#receivedMs = performance.now();
    this.#numbers = this.#colours.assign(packet);
    this.#sent.push([packet.publish_ms, packet.seq]);
    const oldestMs = packet.publish_ms - RATE_WINDOW_MS;
    while (this.#sent.length > 2 && this.#sent[0][0] < oldestMs) this.#sent.shift();
    this.#parts.hint.hidden = image !== null;
    this.draw();
    this.#showState();
    this.#parts.counts.textContent = this.#countLabels();
  }

  /** Draw the last frame again, for instance with other settings. */
  draw() {
    if (!this.#frame) return;
    const canvas = this.#parts.canvas;
    drawFrame(canvas, this.#frame, this.#image, this.#numbers, this.show, canvas.clientWidth);
  }

  setState({ state, reason }) {
    this.updatedMs = performance.now();
    this.#state = reason ? `${state}: ${reason}` : state;
    this.element.dataset.state = state;
    this.#showState();
  }

  /** Set whether this source is shown alone. */
  setOpen(isOpen) {
    this.element.classList.toggle("open", isOpen);
    this.#parts.open.setAttribute(
      "aria-label",
      isOpen ? "Show all sources" : `Show ${this.name} full size`,
    );
    this.#parts.open.setAttribute("aria-pressed", String(isOpen));
    this.draw();
  }

  /** Show the figures; called twice a second. */
  tick() {
    this.#showState();
    const frame = this.#frame;
    if (!frame) return;
    const rate = this.#rate();
    const ageMs = frame.ageMs + this.silentMs;
    const parts = this.#parts;
    parts.fps.textContent = this.#isSilent() ? "0" : rate.toFixed(rate < 1 ? 2 : 1);
    parts.latency.textContent = milliseconds(frame.latency_ms);
    parts.age.textContent = milliseconds(ageMs);
    parts.dropped.textContent = frame.dropped;
    parts.lost.textContent = frame.lost;
    const counts = this.#countLabels();
    parts.counts.textContent = counts;
    parts.regions.replaceChildren(...regionItems(frame));
    parts.canvas.setAttribute("aria-label", `${this.name}: ${counts}`);
  }

  /** Free the image's memory. */
  close() {
    this.#image?.close();
    this.#image = null;
    this.element.remove();
  }

  /** Frames published per second; 0 while unknown. */
  #rate() {
    const [first, last] = [this.#sent[0], this.#sent.at(-1)];
    return last[0] > first[0] ? (1000 * (last[1] - first[1])) / (last[0] - first[0]) : 0;
  }

  #isSilent() {
    const rate = this.#rate();
    const expectedMs = rate ? (SILENT_AFTER_INTERVALS * 1000) / rate : 0;
    const afterMs = Math.min(Math.max(SILENT_AFTER_MS, expectedMs), MAX_SILENT_AFTER_MS);
    return this.silentMs > afterMs;
  }

  #showState() {
    const silent = this.#frame && !this.#state.startsWith("ended") && this.#isSilent();
    const text = silent
      ? `${this.#state || "streaming"}, no frames`
      : this.#state || (this.#frame ? "streaming" : "waiting");
    this.element.classList.toggle("silent", Boolean(silent));
    // Written only when it changes, because a screen reader announces each write.
    if (this.#parts.state.textContent !== text) this.#parts.state.textContent = text;
  }

  #countLabels() {
    const { labels, scores, names, count } = this.#frame;
    const counts = new Map();
    for (let i = 0; i < count; i++) {
      if (scores[i] < this.show.score) continue;
      const name = names[labels[i]] ?? `label ${labels[i]}`;
      counts.set(name, (counts.get(name) ?? 0) + 1);
    }
    const sorted = [...counts].sort((a, b) => b[1] - a[1]);
    return sorted.map(([name, n]) => `${name} ${n}`).join(", ") || "nothing";
  }

  #save() {
    if (!this.#frame) return;
    const time = new Date(this.#frame.publish_ms).toISOString().replaceAll(":", "-");
    this.#parts.canvas.toBlob((blob) => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = `${this.name}-${time}.png`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    }, "image/png");
  }
}

function regionItems({ zones, lines }) {
  const texts = Object.entries(zones).map(([zone, n]) => `zone ${zone}: ${n}`);
  for (const [line, { forward = 0, backward = 0 }] of Object.entries(lines)) {
    texts.push(`line ${line}: ${forward} forward, ${backward} backward`);
  }
  return texts.map((text) => {
    const item = document.createElement("li");
    item.textContent = text;
    return item;
  });
}

function milliseconds(ms) {
  return ms < 10_000 ? `${Math.round(ms)} ms` : `${Math.round(ms / 1000)} s`;
}
