"""The report in a real browser, at the widths of a desktop and of a phone."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from dasd_megatron.observability.report.page import write_report
from tests.support.browser import Page, browser_page, find_browser

BROWSER = find_browser()
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt-get install chromium fonts-dejavu-core)"),
]

DESKTOP, PHONE = {"width": 1280}, {"width": 390, "phone": True}
STEPS, GROUPS, SAMPLES = 1000, 2, 5
WORDS = [
    "add",
    "both",
    "sides",
    "then",
    "divide",
    "by",
    "seven",
    "and",
    "check",
    "the",
    "result",
    "so",
    "the",
    "answer",
    "is",
    "therefore",
    "maybe",
    "wait",
]


def make_run(path: Path, name: str, seed: int) -> Path:
    """A run of 1,000 steps with 10,000 rollouts."""
    noise = random.Random(seed)
    for folder in ("rollouts", "inspect"):
        (path / folder).mkdir(parents=True)
    (path / "config.yaml").write_text(
        f"run: {{name: {name}, seed: {seed}, steps: {STEPS}}}\nalgorithm: {{name: dasd, beta: 0.{seed}}}\n"
    )
    (path / "environment.json").write_text("{}")
    rows = []
    for step in range(1, STEPS + 1):
        share = min(0.9, 0.2 + step / 1500) + 0.1 * noise.random()
        rows.append(
            {
                "step": step,
                "reward/accuracy": share,
                "reward/mean": share,
                "entropy/mean": 0.5 + noise.random() / 5,
                "response/length_mean": 30 + 5 * noise.random(),
                "update/grad_norm": noise.expovariate(1.0),
                "rollout/kl": noise.expovariate(1e5),
                "throughput/tokens_per_second": 1000.0 + 100 * noise.random(),
                **{
                    f"seconds/{phase}": noise.random()
                    for phase in ("rollout", "verify", "score", "update", "sync", "checkpoint")
                },
                "seconds/total": 4.0,
            }
        )
        samples, inspected = [], []
        for place in range(GROUPS * SAMPLES):
            words = [f"{noise.choice(WORDS)} " for _ in range(30)] + [f"\n\\boxed{{{step}}}"]
            reward = float(noise.random() < share)
            sample = {
                "problem_id": f"p{step}-{place}",
                "problem": f"What is {step} times {place}?",
                "text": "".join(words),
                "reward": reward,
            }
            samples.append(
                sample
                | {"group": place // SAMPLES, "expected_answer": "7", "predicted_answer": "7", "finish_reason": "stop"}
            )
            numbers = {name: [noise.gauss(0, 1) for _ in words] for name in ("delta", "omega", "token_advantage")}
            numbers |= {name: [-noise.random() for _ in words] for name in ("student_log_prob", "teacher_log_prob")}
            numbers |= {
                "entropy": [noise.random() for _ in words],
                "tokens": words,
                "advantage": 0.5,
                "tau": 0.8,
                "sigma": 0.1,
            }
            inspected.append(sample | numbers)
        (path / "rollouts" / f"step_{step:06d}.jsonl").write_text(
            "".join(json.dumps(sample) + "\n" for sample in samples)
        )
        (path / "inspect" / f"step_{step:06d}.json").write_text(json.dumps(inspected[:4]))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for label, step in (("before", 0), ("after", STEPS)):
        line = {"step": step, "label": label, "num_problems": 9, "num_samples": 4}
        line |= {name: noise.random() for name in ("avg@4", "pass@1", "pass@2", "pass@4", "maj@4")}
        with open(path / "evaluation.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run's page, two runs' page, and the page of a run that has only begun."""
    folder = tmp_path_factory.mktemp("report")
    runs = [make_run(folder / name, name, seed) for seed, name in enumerate(("first", "second"), 1)]
    begun = folder / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text("run: {name: begun}\n")
    return {
        "one": write_report(runs[:1], folder / "one.html"),
        "two": write_report(runs, folder / "two.html"),
        "begun": write_report([begun], folder / "begun.html"),
    }


async def looked_at(page: Page, path: Path, view: dict[str, Any], picture: str, dark: bool = False) -> None:
    """Open it; nothing may be asked for or complained about, nothing may stick out of the window or be drawn over each
    other."""
    page.requests.clear()
    await page.open(path, dark=dark, **view)
    assert [request for request in page.requests if request != path.absolute().as_uri()] == []
    assert (
        await page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [view["width"]] * 2
    )
    letters = (
        "[...document.querySelectorAll('svg text')].filter((one) => one.textContent && one.getBoundingClientRect()"
    )
    assert await page.evaluate(f"{letters}.height < 8).length") == 0, "letters too small to read"
    assert await page.evaluate(f"{letters}.left < 0 || one.getBoundingClientRect().right > innerWidth).length") == 0, (
        "labels cut off"
    )
    overlaps = """[...document.querySelectorAll('svg[data-chart]')].filter((svg) => {
        const boxes = [...svg.querySelectorAll('text')].map((text) => text.getBoundingClientRect());
        return boxes.some((a, i) => boxes.slice(i + 1).some((b) => 
            a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3));
    }).map((svg) => svg.getAttribute('aria-label'))"""
    assert await page.evaluate(overlaps) == [], "labels over each other"
    if folder := os.environ.get("REPORT_SCREENSHOTS"):
        await page.screenshot(Path(folder) / f"{picture}-{view['width']}{'-dark' if dark else ''}.png")


async def drawn(page: Page) -> dict[str, int]:
    """Sizes of what must not be empty."""
    return await page.evaluate("""({
        charts: [...document.querySelectorAll('svg[data-chart]')]
            .filter((one) => one.getBoundingClientRect().height > 80).length,
        empty: [...document.querySelectorAll('svg[data-chart]')]
            .filter((one) => !one.querySelector('.curve[d], .layer[d]')).length,
        rows: document.querySelectorAll('#groups-table tbody tr:not([hidden])').length,
        phases: document.querySelectorAll('#phases tbody tr').length,
        rollouts: document.querySelectorAll('.heat').length,
        tokens: [...document.querySelectorAll('.tokens i')]
            .filter((one) => one.getBoundingClientRect().width > 0).length,
    })""")


async def count(page: Page, picker: str) -> str:
    return await page.evaluate(f"document.querySelector('#{picker} .count').textContent")


async def enter(page: Page, selector: str, place: int, value: str) -> None:
    """Give the field or the choice at ``place`` among those of the selector a value, as a person does."""
    await page.evaluate(
        f"(() => {{ const one = document.querySelectorAll('{selector}')[{place}]; one.value = {json.dumps(value)};"
        "one.dispatchEvent(new Event('input')); one.dispatchEvent(new Event('change')); })()"
    )


async def middle(page: Page, selector: str) -> list[float]:
    """Bring an element into the window and return its x and y."""
    return await page.evaluate(
        f"""(() => {{ const one = document.querySelector('{selector}'); one.scrollIntoView({{block: 'center'}});
        const box = one.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; }})()"""
    )


async def press(page: Page, selector: str) -> None:
    await page.evaluate(f"document.querySelector({json.dumps(selector)}).click()")


async def colours(page: Page) -> set[str]:
    return set(
        await page.evaluate(
            "[...document.querySelectorAll('.tokens i')].map((one) => getComputedStyle(one).backgroundColor)"
        )
    )


async def test_the_page_of_a_long_run(pages: dict[str, Path], tmp_path: Path) -> None:
    assert pages["one"].stat().st_size < 5_000_000
    async with browser_page(BROWSER, tmp_path) as page:
        for view in (DESKTOP, PHONE):
            await looked_at(page, pages["one"], view, "one")
            found = await drawn(page)
            assert found["charts"] >= 7 and found["empty"] == 0
            assert (found["rows"], found["phases"], found["rollouts"]) == (10, 8, 5) and found["tokens"] == 5 * 31

            # Pages and search of the rollouts.
            shown = int((await count(page, "rollouts-picker")).split()[-1])
            assert 1000 < shown < 4000 and (await count(page, "rollouts-picker")).startswith("page 1 of ")
            first = await page.evaluate("document.querySelector('.heat h3').textContent")
            assert first == "Step 1, rollout 1"
            await press(page, "#rollouts-picker [data-move='1']")
            assert await page.evaluate("document.querySelector('.heat h3').textContent") != first
            await enter(page, "#rollouts-picker input", 0, "WHAT IS 1000 TIMES 3?")
            assert await count(page, "rollouts-picker") == f"page 1 of 1 · 1 of {shown}"
            assert await page.evaluate("document.querySelector('.heat h3').textContent") == "Step 1000, rollout 4"
            await enter(page, "#rollouts-picker input", 0, "not to be found")
            assert "No rollout matches." in await page.evaluate("document.getElementById('rollouts').textContent")
            await enter(page, "#rollouts-picker input", 0, "")
            await enter(page, "#rollouts-picker select", 0, "no")
            assert await page.evaluate(
                "[...document.querySelectorAll('.heat')].every((one) => one.textContent.includes('✗ rejected'))"
            )

            # The switch between the four quantities.
            palettes = []
            for choice in "whda":
                await press(page, f"#rollouts-picker [data-choice='{choice}']")
                palettes.append(await colours(page))
                assert len(palettes[-1]) > 5 and await page.evaluate("document.querySelectorAll('#ramp i').length") > 10
            assert not palettes[1] & palettes[0] - {"rgba(0, 0, 0, 0)"}, "entropy has a colour of its own"

            # Groups: best and worst, and their samples.
            right = (
                "[...document.querySelectorAll('#groups-table tbody tr:not([hidden])')].map((one) => "
                "one.cells[3].textContent)"
            )
            assert set(await page.evaluate(right)) == {"5 of 5"}
            await press(page, "#groups-picker [data-choice='worst']")
            assert set(await page.evaluate(right)) == {"0 of 5"}
            await press(page, "#groups-table button")
            assert "✗ rejected" in await page.evaluate("document.querySelector('#groups-table td.samples').textContent")
            assert await page.evaluate("document.documentElement.scrollWidth") == view["width"]

            # Numbers under the pointer, by pointer and by keyboard.
            x, y = await middle(page, "#training svg")
            await page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
            assert "training step" in await page.evaluate("document.getElementById('tip').textContent")
            await press(page, ".about")
            assert "Healthy:" in await page.evaluate("document.getElementById('tip').textContent")
            edges = await page.evaluate(
                "(({left, right}) => [left, right])(document.getElementById('tip').getBoundingClientRect())"
            )
            assert edges[0] >= 0 and edges[1] <= view["width"]
        await looked_at(page, pages["one"], DESKTOP, "one", dark=True)
        assert page.faults == []


async def test_the_page_of_two_runs(pages: dict[str, Path], tmp_path: Path) -> None:
    assert pages["two"].stat().st_size < 5_000_000
    async with browser_page(BROWSER, tmp_path) as page:
        for view in (DESKTOP, PHONE):
            await looked_at(page, pages["two"], view, "two")
            found = await drawn(page)
            assert found["charts"] >= 7 and found["empty"] == 0 and found["rollouts"] == 5 and found["phases"] == 16
            stroke = "[...svg.querySelectorAll('.curve')].map((one) => getComputedStyle(one).stroke).join(' ')"
            strokes = f"[...document.querySelectorAll('#training svg')].map((svg) => {stroke})"
            kinds = set(await page.evaluate(strokes))
            assert len(kinds) == 1 and len(set(kinds.pop().split(") "))) == 2, (
                "each run has one colour in all charts, and its own"
            )
            fields = "[...document.querySelectorAll('#differences tbody td:first-child')].map((one) => one.textContent)"
            assert await page.evaluate(fields) == ["algorithm.beta", "run.name", "run.seed"]
            await enter(page, "#rollouts-picker select", 1, "1")
            assert await page.evaluate(
                "[...document.querySelectorAll('.heat h3')].every((one) => one.textContent.startsWith('second,'))"
            )
        assert page.faults == []


async def test_the_page_of_a_run_that_has_only_begun(pages: dict[str, Path], tmp_path: Path) -> None:
    async with browser_page(BROWSER, tmp_path) as page:
        for view in (DESKTOP, PHONE):
            await looked_at(page, pages["begun"], view, "begun")
            assert "No training step yet" in await page.evaluate("document.body.textContent")
        assert page.faults == []
