// The page: a websocket to the server, the controls, and a tile for each source.

import { readPacket } from "./packet.js";
import { Tile } from "./tile.js";

const WRONG_TOKEN = 4401;
const TOO_MANY = 4429;
const MAX_BACKOFF_MS = 5000;
const TICK_MS = 500;
const FORGET_AFTER_MS = 10_000; // after a reconnection, for sources that a restarted view does not know
const TOGGLES = ["masks", "boxes", "pose", "labels"];

const byId = (id) => document.getElementById(id);
const grid = byId("grid");
const show = { masks: true, boxes: true, pose: true, labels: true, score: 0 };
const tiles = new Map();
let connectedMs = 0;
let paused = false;
let held = []; // names of frames to acknowledge when the page is shown and not paused
let socket = null;
let backoffMs = 250;

function token() {
  return new URLSearchParams(location.hash.slice(1)).get("token") ?? "";
}

function setLink(text) {
  if (byId("link").textContent !== text) byId("link").textContent = text;
}

function connect() {
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  socket = new WebSocket(`${scheme}//${location.host}/stream`);
  socket.binaryType = "arraybuffer";
  held = [];
  const opened = socket;
  opened.onopen = () => {
    connectedMs = performance.now();
    opened.send(token());
  };
  opened.onmessage = ({ data }) => {
    if (typeof data === "string") {
      receiveText(JSON.parse(data));
    } else {
      receiveFrame(data, opened);
    }
  };
  opened.onclose = ({ code }) => {
    if (code === WRONG_TOKEN) {
      setLink("token required");
      byId("access").hidden = false;
      byId("token").focus();
      return;
    }
    setLink(code === TOO_MANY ? "too many browsers; trying again" : "disconnected; reconnecting");
    setTimeout(connect, backoffMs * (0.75 + Math.random() / 2));
    backoffMs = Math.min(2 * backoffMs, MAX_BACKOFF_MS);
  };
}

function receiveText(message) {
  backoffMs = 250;
  if (message.kind === "link") {
    setLink(message.silent ? "connected; no data from the publisher" : "connected");
  } else if (message.kind === "state") {
    if (message.state === "ended" && message.reason === "removed") {
      removeTile(message.source);
    } else {
      tileOf(message.source).setState(message);
    }
  }
}

async function receiveFrame(buffer, from) {
  const packet = readPacket(buffer);
  if (packet.keypoints) byId("pose").parentElement.hidden = false;
  if (tiles.has(packet.source)) tiles.get(packet.source).updatedMs = performance.now();
  if (!paused && !document.hidden) {
    try {
      await tileOf(packet.source).add(packet);
    } finally {
      acknowledge(packet.source, from); // otherwise the server sends no more frames of this source
    }
  } else {
    held.push(packet.source); // without acknowledgements, the server sends no more frames
  }
}

function acknowledge(source, to) {
  if (to.readyState === WebSocket.OPEN) to.send(source);
}

function releaseHeld() {
  if (paused || document.hidden) return;
  for (const source of held) acknowledge(source, socket);
  held = [];
}

function tileOf(name) {
  let tile = tiles.get(name);
  if (!tile) {
    tile = new Tile(name, byId("tile"), show, openTile);
    tiles.set(name, tile);
    const next = [...tiles.keys()].filter((other) => other > name).sort()[0];
    grid.insertBefore(tile.element, next === undefined ? null : tiles.get(next).element);
    byId("empty").hidden = true;
  }
  return tile;
}

function removeTile(name) {
  const tile = tiles.get(name);
  if (!tile) return;
  if (tile.element.classList.contains("open")) openTile(tile);
  tile.close();
  tiles.delete(name);
  byId("empty").hidden = tiles.size > 0;
}

/** Show one source alone, or all again. */
function openTile(tile) {
  const isOpen = !tile.element.classList.contains("open");
  grid.classList.toggle("single", isOpen);
  for (const other of tiles.values()) other.setOpen(other === tile && isOpen);
}

function drawAll() {
  for (const tile of tiles.values()) tile.draw();
}

for (const name of TOGGLES) {
  byId(name).addEventListener("change", (event) => {
    show[name] = event.target.checked;
    drawAll();
  });
}
byId("score").addEventListener("input", (event) => {
  show.score = event.target.valueAsNumber / 100;
  byId("score-value").textContent = `${event.target.value}%`;
  drawAll();
});
byId("pause").addEventListener("click", (event) => {
  paused = !paused;
  event.target.setAttribute("aria-pressed", String(paused));
  releaseHeld();
});
byId("access").addEventListener("submit", (event) => {
  event.preventDefault();
  location.hash = new URLSearchParams({ token: byId("token").value });
  byId("access").hidden = true;
  setLink("connecting");
  connect();
});
document.addEventListener("visibilitychange", releaseHeld);
document.addEventListener("keydown", (event) => {
  const open = [...tiles.values()].find((tile) => tile.element.classList.contains("open"));
  if (event.key === "Escape" && open) openTile(open);
});
addEventListener("resize", drawAll);
setInterval(() => {
  const isUpToDate = // a view sends everything that it knows to a browser that connects
    socket.readyState === WebSocket.OPEN && performance.now() > connectedMs + FORGET_AFTER_MS;
  for (const tile of tiles.values()) {
    if (isUpToDate && tile.updatedMs < connectedMs) {
      removeTile(tile.name);
    } else {
      tile.tick();
    }
  }
}, TICK_MS);
// The browser may have restored the controls of an earlier visit.
for (const name of TOGGLES) show[name] = byId(name).checked;
show.score = byId("score").valueAsNumber / 100;
byId("score-value").textContent = `${byId("score").value}%`;
connect();
