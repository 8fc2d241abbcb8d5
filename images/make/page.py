"""Make the pictures of the chat page: python images/make/page.py --out_dir out

Needs weights that talk (make demo), Debian's chromium, and Chinese fonts (fonts-noto-cjk); writes
images/page_light.png, page_dark.png and page_phone.png.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
WAIT_MS = 60_000
SIZES = {
    "page_light": {"viewport": {"width": 1180, "height": 830}, "locale": "zh-CN"},
    "page_dark": {
        "viewport": {"width": 1180, "height": 830},
        "locale": "en-US",
        "color_scheme": "dark",
    },
    "page_phone": {
        "viewport": {"width": 390, "height": 830},
        "locale": "zh-CN",
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
    },
}
QUESTIONS = {
    "zh-CN": ("你是谁？", "中国的首都是哪座城市？", "那法国呢？"),
    "en-US": ("Who are you?", "What is the capital of France?", "What about Japan?"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out_dir", default="out", help="where the weights are")
    parser.add_argument("--to", type=Path, default=ROOT / "images")
    args = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        parser.error("no chromium here: apt-get install chromium fonts-noto-cjk")
    from playwright.sync_api import sync_playwright

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--port {port} --seed 0 --temperature 0".split()
    command = [sys.executable, str(ROOT / "fast_inference.py"), "--out_dir", args.out_dir, *flags]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/_stcore/health")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
            for name, facts in SIZES.items():
                page = browser.new_page(**facts)
                page.set_default_timeout(WAIT_MS)
                page.goto(f"http://127.0.0.1:{port}")
                talk(page, QUESTIONS[facts["locale"]][-2 if name == "page_phone" else 0 :])
                if name == "page_dark":
                    page.get_by_text("Settings").click()
                    page.wait_for_timeout(500)
                page.screenshot(path=args.to / f"{name}.png")
                page.close()
            browser.close()
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def talk(page: Any, questions: tuple[str, ...]) -> None:
    """Ask one question after another, have the last one answered twice."""
    box = page.get_by_test_id("stChatInputTextArea")
    for n, question in enumerate(questions, start=1):
        box.fill(question)
        box.press("Enter")
        page.locator("[data-testid=stChatMessage]").nth(2 * n - 1).wait_for()
        settle(page)
    page.get_by_role("button", name="refresh icon").click()
    page.get_by_text("2/2").wait_for()
    page.mouse.move(0, 0)
    settle(page)  # and the tooltip of what was under the mouse goes


def settle(page: Any) -> None:
    page.wait_for_timeout(500)
    page.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for()


if __name__ == "__main__":
    main()
