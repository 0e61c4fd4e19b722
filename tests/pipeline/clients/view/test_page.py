"""The page in a real browser."""

from __future__ import annotations

import base64
import importlib.util
import io
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from studio import HEIGHT, NAMES, WIDTH, Scene, Studio, blobs, jpeg, union
from witnesses import wait_until

from maskcast.engines.instances.instances import Instances, PolygonMasks
from maskcast.engines.instances.keypoints import COCO_PERSON
from maskcast.pipeline.clients.view.packet import Packet
from maskcast.pipeline.cluster.gateway import Gateway
from maskcast.pipeline.outputs.draw import Annotator, draw_skeleton, limb_colour, palette
from maskcast.pipeline.subscriber.received import PublishedFrame

if importlib.util.find_spec("selenium") is None:
    pytest.skip("selenium is not installed", allow_module_level=True)
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("chromium and chromium-driver are not installed", allow_module_level=True)

from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,900",
)

INSTANCES = blobs([(20.3, 30.8, 120.2, 200.1), (150, 0, 319.6, 90), (140.5, 130.2, 260.9, 239.9)])


class Page:
    """The page, with methods for what a user reads and does on it."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        self.url = url
        driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def tile(self, name: str) -> WebElement | None:
        found = self.driver.find_elements("css selector", f"article[aria-labelledby=source-{name}]")
        return found[0] if found else None

    def part(self, name: str, part: str) -> str:
        tile = self.tile(name)
        if tile is None:
            return ""
        return str(tile.find_element("css selector", f"[data-part={part}]").text)

    def click(self, identifier: str) -> None:
        self.driver.find_element("id", identifier).click()

    def pixels(self, name: str) -> NDArray[np.uint8]:
        """Return the pixels of a source's canvas, ``[H, W, 3]``."""
        encoded = self.run(
            "return arguments[0].querySelector('canvas').toDataURL('image/png')", self.tile(name)
        )
        return decode_png(base64.b64decode(encoded.partition(",")[2]))

    def errors(self) -> list[Any]:
        """Return the errors in the browser's log since the last call, without those of other pages.

        The browser is shared, and a page whose server has ended reports that later.
        """
        log = self.driver.get_log("browser")
        return [e for e in log if e["level"] == "SEVERE" and e["message"].startswith(self.url)]


def decode_png(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / max(int((a | b).sum()), 1))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in CHROMIUM:
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    downloads = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(str(shutil.which("chromedriver")))
    driver = webdriver.Chrome(options=options, service=service)
    driver.downloads = downloads
    driver.set_script_timeout(200)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def first_page(driver: webdriver.Chrome, studio: Studio, serve: Any) -> Page:
    lines = {"door": {"forward": 3, "backward": 1}}
    studio.scenes["cam1"] = Scene(INSTANCES, jpeg(), {"desk": 2}, lines)
    studio.scenes["cam2"] = Scene(blobs([(50, 60, 110, 180)]), jpeg((0, 40, 90)))
    return Page(driver, serve(studio.endpoint))


@pytest.fixture
def page(first_page: Page) -> Page:
    """Wait for the tiles each time: a test may have loaded another page and then this one again."""
    parts = (("cam1", "counts"), ("cam2", "fps"))
    wait_until(lambda: all(first_page.part(*part) for part in parts), what="two tiles")
    return first_page


def test_the_page_loads_without_an_error_and_shows_every_source(page: Page) -> None:
    assert page.driver.title == "maskcast"
    wait_until(lambda: page.part("cam1", "regions"), what="zones and lines")
    assert page.part("cam1", "state") == "streaming"
    assert page.part("cam1", "counts") == "person 2, dog 1"
    assert page.part("cam1", "regions").splitlines() == [
        "zone desk: 2",
        "line door: 3 forward, 1 backward",
    ]
    assert page.part("cam1", "latency").endswith("ms")
    assert page.part("cam1", "age").endswith("ms")
    assert (page.part("cam1", "dropped"), page.part("cam1", "lost")) == ("0", "0")
    wait_until(lambda: float(page.part("cam1", "fps")) > 1, what="the rate")
    assert page.driver.find_element("id", "link").text == "connected"
    assert page.errors() == []


def test_masks_are_where_the_python_painter_draws_them(page: Page) -> None:
    page.click("boxes")
    page.click("labels")
    try:
        drawn = page.pixels("cam1")
        assert drawn.shape == (HEIGHT, WIDTH, 3)
        assert iou(drawn.any(axis=2), union(INSTANCES)) >= 0.97
        painted = Image.new("RGB", (WIDTH, HEIGHT))
        Annotator(NAMES).draw(painted, INSTANCES)
        for i in range(len(INSTANCES)):
            x1, y1, x2, y2 = (int(v) for v in INSTANCES.boxes[i])
            inside = np.zeros((HEIGHT, WIDTH), dtype=np.bool_)
            inside[y1 + 20 : y2 - 2, x1 + 2 : x2 - 2] = True  # without the painter's box and tag
            assert iou(drawn.any(axis=2) & inside, INSTANCES.mask(i) & inside) >= 0.97
            mask = INSTANCES.mask(i) & inside
            difference = np.abs(drawn[mask].astype(int) - np.asarray(painted)[mask])
            assert np.mean(difference.max(axis=1) <= 3) > 0.97
            assert np.any(np.all(drawn[mask] == palette(i + 1), axis=1)), "the outline is solid"
        page.click("masks")
        assert not page.pixels("cam1").any()
        page.click("masks")
    finally:
        page.click("boxes")
        page.click("labels")


def test_the_score_slider_hides_instances_and_leaves_them_out_of_the_count(page: Page) -> None:
    slider = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    score = page.driver.find_element("id", "score")
    page.run(slider, score, 90)
    try:
        wait_until(lambda: page.part("cam1", "counts") == "person 1", what="the count")
        pixels = page.pixels("cam1")
        assert pixels[40:190, 30:110].any()
        assert not pixels[140:230, 150:250].any()
        page.run(slider, score, 100)
        wait_until(lambda: page.part("cam1", "counts") == "nothing", what="the count")
        assert not page.pixels("cam1").any()
    finally:
        page.run(slider, score, 0)


def figure() -> Instances:
    """Return two people; only the head and the shoulders of the second are visible."""
    found = blobs([(20, 20, 140, 220), (180, 20, 300, 220)])
    places = np.random.default_rng(3).uniform([0.1, 0.1], [0.9, 0.9], (2, 17, 2))
    points = found.boxes[:, None, :2] + places * (
        found.boxes[:, None, 2:] - found.boxes[:, None, :2]
    )
    scores = np.full((2, 17, 1), 0.9)
    scores[1, 7:] = 0.1
    return replace(found, keypoints=np.concatenate([points, scores], 2).astype(np.float32))


def test_skeletons_are_where_the_python_painter_draws_them(page: Page, studio: Studio) -> None:
    instances = figure()
    studio.scenes["cam3"] = Scene(instances, jpeg())
    others = ("masks", "boxes", "labels")
    try:
        wait_until(lambda: page.driver.find_element("id", "pose").is_displayed(), what="the switch")
        for name in others:
            page.click(name)
        painted = Image.new("RGB", (WIDTH, HEIGHT))
        pen = ImageDraw.Draw(painted)
        for points in instances.keypoints[::-1]:
            draw_skeleton(pen, points, COCO_PERSON.skeleton, 3)
        drawn, wanted = page.pixels("cam3"), np.asarray(painted)
        assert iou(drawn.any(axis=2), wanted.any(axis=2)) >= 0.85  # the browser smooths edges
        colours = {tuple(pixel) for pixel in drawn.reshape(-1, 3).tolist()}
        count = len(COCO_PERSON.skeleton)
        assert {limb_colour(number, count) for number in range(count)} <= colours
        x, y = instances.keypoints[1, 12, :2].astype(int)  # a hip that is not seen
        assert not drawn[y - 3 : y + 4, x - 3 : x + 4].any(axis=2).all()
        page.click("pose")
        assert not page.pixels("cam3").any()
        page.click("pose")
    finally:
        for name in others:
            page.click(name)
        del studio.scenes["cam3"]
        studio.event("cam3", "ended", reason="removed")
    wait_until(lambda: page.tile("cam3") is None, what="no third tile")


DRAW = """
const [encoded, done] = arguments;
const bytes = Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0));
Promise.all([import('/packet.js'), import('/draw.js')]).then(([{ readPacket }, { drawFrame }]) => {
  const canvas = document.createElement('canvas');
  const frame = readPacket(bytes.buffer);
  const show = { masks: true, boxes: false, pose: true, labels: false, score: 0 };
  drawFrame(canvas, frame, null, frame.ids, show, 0);
  done(canvas.toDataURL('image/png'));
});
"""


def encoded_packet(instances: Instances, seq: int = 0, publish_ns: int = 0) -> str:
    frame = PublishedFrame(
        source="cam9", publisher="a" * 16, seq=seq, index=0, pts_s=None, capture_ns=0,
        publish_ns=publish_ns,
        received_ns=0, age_ms=0, lost_before=0, skipped_before=0, restarted=False, clock="receipt",
        stage_ms={}, drops={}, dropped_before=0, zones={}, lines={}, instances=instances,
        label_names=NAMES, keypoints=None, jpeg=None,
    )  # fmt: skip
    return base64.b64encode(Packet(frame, 0).encode()).decode()


def draw_in_browser(page: Page, instances: Instances) -> NDArray[np.bool_]:
    url = page.driver.execute_async_script(DRAW, encoded_packet(instances))
    pixels = decode_png(base64.b64decode(url.partition(",")[2]))
    different: NDArray[np.bool_] = (pixels != pixels[0, 0]).any(axis=2)
    return different


def test_the_paste_rule_holds_for_boxes_of_every_size_and_place(page: Page) -> None:
    random = np.random.default_rng(5)
    for i in range(12):
        left, top = random.uniform(-1, 300), random.uniform(-1, 220)
        x1, y1 = max(left, 2.0), max(top, 2.0)
        box = (
            x1,
            y1,
            min(x1 + random.uniform(0, 1) ** 2 * 250, WIDTH),
            min(y1 + random.uniform(0, 1) ** 2 * 200, HEIGHT),
        )
        instances = blobs([box], seed=i)
        assert np.array_equal(draw_in_browser(page, instances), union(instances)), box


def test_polygons_are_drawn_too(page: Page) -> None:
    rings = tuple(tuple(INSTANCES.polygons(i)) for i in range(len(INSTANCES)))
    instances = replace(INSTANCES, masks=PolygonMasks(rings))
    assert iou(draw_in_browser(page, instances), union(INSTANCES)) >= 0.93  # the line is outside


SHOW_LATER = """
const [packets, waitMs, done] = arguments;
Promise.all([import('/packet.js'), import('/tile.js')]).then(async ([{ readPacket }, { Tile }]) => {
  const show = { masks: true, boxes: false, pose: true, labels: false, score: 0 };
  const tile = new Tile('cam9', document.getElementById('tile'), show, () => {});
  for (const encoded of packets) {
    await tile.add(readPacket(Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0)).buffer));
  }
  const now = performance.now.bind(performance);
  performance.now = () => now() + waitMs;
  tile.tick();
  performance.now = now;
  done(['fps', 'state'].map((p) => tile.element.querySelector(`[data-part=${p}]`).textContent));
});
"""


@pytest.mark.parametrize(
    ("interval_s", "wait_s", "fps", "state"),
    [
        (0.1, 2, "10.0", "streaming"),
        (0.1, 4, "0", "streaming, no frames"),
        (8, 10, "0.13", "streaming"),
        (8, 30, "0", "streaming, no frames"),
        (3600, 50, "0.00", "streaming"),
        (3600, 70, "0", "streaming, no frames"),  # it was away for an hour
    ],
)
def test_a_source_with_a_low_frame_rate_is_not_shown_as_without_frames(
    page: Page, interval_s: float, wait_s: float, fps: str, state: str
) -> None:
    packets = [encoded_packet(INSTANCES, seq, int(seq * interval_s * 1e9)) for seq in range(3)]
    shown = page.driver.execute_async_script(SHOW_LATER, packets, 1000 * wait_s)
    assert shown == [fps, state]


def test_a_source_that_ends_and_comes_back_is_shown(page: Page, studio: Studio) -> None:
    scene = studio.scenes.pop("cam2")
    studio.event("cam2", "ended", reason="end of stream")
    wait_until(lambda: page.part("cam2", "state") == "ended: end of stream", what="the end")
    assert page.pixels("cam2").any(), "the last frame stays"
    studio.event("cam2", "state", state="streaming", reconnects=1)
    studio.scenes["cam2"] = replace(scene, instances=blobs([(5, 5, 90, 90), (100, 100, 200, 200)]))
    wait_until(lambda: page.part("cam2", "state") == "streaming", what="the return")
    wait_until(lambda: page.part("cam2", "counts") == "person 1, dog 1", what="new frames")
    studio.event("cam2", "state", state="stalled", reconnects=1, reason="no data")
    wait_until(lambda: page.part("cam2", "state") == "stalled: no data", what="the stall")
    studio.event("cam2", "state", state="streaming", reconnects=1)
    wait_until(lambda: page.part("cam2", "state") == "streaming", what="the return")


def test_a_removed_source_leaves_the_page(page: Page, studio: Studio) -> None:
    studio.scenes["cam0"] = Scene(blobs([]), None)
    wait_until(lambda: page.tile("cam0"), what="a third tile")
    wait_until(lambda: "--jpeg-quality" in page.part("cam0", "hint"), what="the missing image")
    assert page.run("return document.querySelector('article h2').textContent") == "cam0"  # sorted
    del studio.scenes["cam0"]
    studio.event("cam0", "ended", reason="removed")
    wait_until(lambda: page.tile("cam0") is None, what="no third tile")


def test_silent_sources_behind_a_gateway_stay_on_the_page(
    driver: webdriver.Chrome, page: Page, serve: Any
) -> None:
    with Gateway("tcp://127.0.0.1:0", "tcp://127.0.0.1:0") as gateway:
        loud = Studio("", gateway=gateway.sources_endpoint)
        away = Studio("", gateway=gateway.sources_endpoint)
        try:
            loud.scenes["loud"] = Scene(INSTANCES)
            away.event("away", "state", state="reconnecting", reconnects=1, reason="no answer")
            both = Page(driver, serve(gateway.endpoint))
            wait_until(lambda: both.part("away", "state"), what="the source without frames")
            for _ in range(3):  # each change reaches the page with a frame
                for instances in (INSTANCES, blobs([])):
                    loud.scenes["loud"] = Scene(instances)
                    counts = "person 2, dog 1" if len(instances) else "nothing"
                    wait_until(lambda: both.part("loud", "counts") == counts, what=counts)  # noqa: B023
                assert both.part("away", "state") == "reconnecting: no answer"
        finally:
            loud.close()
            away.close()
            driver.get(page.url)


def test_a_source_opens_and_closes_with_the_keyboard(page: Page) -> None:
    tile = page.tile("cam1")
    assert tile is not None
    button = tile.find_element("css selector", ".frame")
    assert button.get_attribute("aria-label") == "Show cam1 full size"
    width = tile.size["width"]
    button.send_keys(Keys.ENTER)
    other = page.tile("cam2")
    assert other is not None
    assert not other.is_displayed()
    assert tile.size["width"] > 1.5 * width
    assert button.get_attribute("aria-label") == "Show all sources"
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert page.run(outline) == "solid", "the focus is visible"
    button.send_keys(Keys.ESCAPE)
    assert other.is_displayed()


def test_a_screen_reader_finds_names_and_states(page: Page) -> None:
    unnamed = page.run(
        """return [...document.querySelectorAll('button, input, canvas')].filter((e) =>
        !e.closest('template, [hidden]') && !e.getAttribute('aria-label') && !e.textContent.trim()
        && !e.labels?.length).map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    tile = page.tile("cam1")
    assert tile is not None
    assert tile.find_element("css selector", "[data-part=state]").aria_role == "status"
    canvas = tile.find_element("css selector", "canvas")
    wait_until(
        lambda: canvas.get_attribute("aria-label") == "cam1: person 2, dog 1",
        what="the canvas's description",
    )


def test_pause_freezes_the_frame_and_resume_continues(page: Page, studio: Studio) -> None:
    scene = studio.scenes["cam1"]
    pause = page.driver.find_element("id", "pause")
    pause.click()
    try:
        assert pause.get_attribute("aria-pressed") == "true"
        studio.scenes["cam1"] = replace(scene, instances=blobs([]))
        age = "return parseInt(arguments[0].querySelector('[data-part=age]').textContent)"
        wait_until(lambda: page.run(age, page.tile("cam1")) > 1500, what="the frame gets older")
        assert page.pixels("cam1").any()
        pause.click()
        wait_until(lambda: page.part("cam1", "counts") == "nothing", what="new frames")
    finally:
        studio.scenes["cam1"] = scene
    wait_until(lambda: page.part("cam1", "counts") == "person 2, dog 1", what="new frames")


def test_a_snapshot_is_saved_as_png(page: Page) -> None:
    tile = page.tile("cam1")
    assert tile is not None
    tile.find_element("css selector", ".snapshot").click()
    folder: Path = page.driver.downloads  # type: ignore[attr-defined]
    file = wait_until(lambda: next(folder.glob("cam1-*.png"), None), what="the file")
    assert decode_png(file.read_bytes()).shape == (HEIGHT, WIDTH, 3)


def test_a_phone_needs_no_horizontal_scrolling(page: Page) -> None:
    command = "Emulation.setDeviceMetricsOverride"
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd(command, metrics)
    try:
        assert page.run("return innerWidth") == 360
        assert page.run("return document.documentElement.scrollWidth") <= 360
        sizes = page.run(
            """return [...document.querySelectorAll('#controls label, button')]
            .map((e) => e.getBoundingClientRect()).filter((r) => r.width)
            .map((r) => [r.left, r.right, r.height])"""
        )
        assert sizes
        for left, right, height in sizes:
            assert left >= 0
            assert right <= 360
            assert height >= 30  # large enough for a finger
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_light_and_dark(page: Page, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        colours = page.run(
            """const style = getComputedStyle(document.body);
            return [style.color, style.backgroundColor].map((c) => c.match(/\\d+/g).map(Number))"""
        )
        text, ground = (sum(colour[:3]) for colour in colours)
        assert (text < ground) is (scheme == "light")
        assert abs(text - ground) > 450
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_page_asks_for_the_token(page: Page, studio: Studio, serve: Any) -> None:
    guarded = Page(page.driver, serve(studio.endpoint, "correct-horse-battery"))
    try:
        field = guarded.driver.find_element("id", "token")
        wait_until(field.is_displayed, what="the question")
        assert guarded.tile("cam1") is None
        field.send_keys("correct-horse-battery", Keys.ENTER)
        wait_until(lambda: guarded.part("cam1", "counts"), what="a frame")
        guarded.driver.refresh()  # the token is in the URL's fragment
        wait_until(lambda: guarded.part("cam1", "counts"), what="a frame")
    finally:
        page.driver.get(page.url)
        page.errors()  # the refused connection is in the log


def test_the_page_reconnects_when_the_server_is_restarted(page: Page, studio: Studio) -> None:
    from maskcast.pipeline.clients.view.listener import Listener
    from maskcast.pipeline.clients.view.server import ViewServer, subscribe_for_view

    address = "127.0.0.1:0"
    seen = ""
    try:
        for _ in range(2):
            listener = Listener(address)
            server = ViewServer(subscribe_for_view(studio.endpoint), listener)
            thread = threading.Thread(target=server.run)
            thread.start()
            try:
                if not seen:
                    restarted = Page(page.driver, listener.url)
                    address = listener.url.removeprefix("http://").rstrip("/")
                link = page.driver.find_element("id", "link")
                wait_until(lambda: link.text == "connected", what="a connection")  # noqa: B023
                wait_until(lambda: restarted.part("cam1", "counts"), what="a frame")  # noqa: B023
                seen = restarted.part("cam1", "state")
            finally:
                server.stop()
                thread.join()
            wait_until(lambda: "reconnecting" in link.text, what="the disconnection")  # noqa: B023
    finally:
        page.driver.get(page.url)
    assert seen == "streaming"
