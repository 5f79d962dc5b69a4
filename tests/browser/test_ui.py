"""What a person sees in the Prefect UI, in a real Chromium: deployments, one rotation's graph, its artifacts and its message.

Screenshots go to .screenshots/ for people to look at.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.world import World
from tests.long.prefect_api import PrefectApi

playwright = pytest.importorskip("playwright.sync_api", reason="make test-browser installs it")
pytestmark = pytest.mark.browser
SHOTS = Path(__file__).parents[2] / ".screenshots"
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("browser") / "home", {"gateways.cache_time": "6s"}) as running:
        yield running


@pytest.fixture(scope="module")
def page(world: World) -> Iterator[playwright.Page]:
    chromium = shutil.which("chromium")
    assert chromium, "Debian's chromium is not there: apt-get install chromium"
    SHOTS.mkdir(exist_ok=True)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1100})
        page.set_default_timeout(30_000)
        yield page
        browser.close()


def test_quick_run_is_one_click_and_its_page_tells_the_story(world: World, page: playwright.Page) -> None:
    """The deployment is found, Quick run starts a rotation, and the run's page shows steps, artifacts and the message in plain words."""
    ui, api = world.facts["prefect_ui_url"], PrefectApi(world.facts["prefect_api_url"])
    page.goto(f"{ui}/deployments")
    page.get_by_text("rotate-signing-keys").first.wait_for()
    page.screenshot(path=SHOTS / "deployments.png")

    deployment = api.get("/deployments/name/rotate-signing-keys/sandbox")
    page.goto(f"{ui}/deployments/deployment/{deployment['id']}")
    page.get_by_text("Description", exact=True).first.click()
    page.get_by_text("waits until every gateway knows it").first.wait_for()
    page.screenshot(path=SHOTS / "deployment.png")
    page.get_by_role("button", name="Run", exact=True).click()
    with page.expect_response(lambda response: response.url.endswith("/create_flow_run")) as created:
        page.get_by_role("button", name="Quick run").click()
    run = created.value.json()["id"]
    assert api.ended(run)["type"] == "COMPLETED"

    page.goto(f"{ui}/runs/flow-run/{run}")
    page.locator("[class*=state-badge]").get_by_text("Completed").first.wait_for()
    page.get_by_text("every gateway knows key").first.wait_for()
    page.wait_for_function("document.querySelector('canvas') !== null")
    page.screenshot(path=SHOTS / "run.png")
    page.get_by_text("Artifacts", exact=True).last.click()
    for card in ("plan-sandbox", "evidence-sandbox", "gateway-cache-sandbox"):
        page.get_by_text(card, exact=True).first.wait_for()
    page.screenshot(path=SHOTS / "artifacts.png")
    page.get_by_text("Details", exact=True).first.click()
    page.get_by_text("rotated from key").first.wait_for()
    page.screenshot(path=SHOTS / "details.png")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("plan-sandbox", "+ gateway cache 6s + clock skew 1s"),
        ("evidence-sandbox", "still knows the old key"),
    ],
)
def test_an_artifact_is_readable_without_knowing_the_code(world: World, page: playwright.Page, key: str, words: str) -> None:
    """The plan shows the sums, the evidence what was proven and every key as it is now."""
    api = PrefectApi(world.facts["prefect_api_url"])
    run = api.get(f"/artifacts/{key}/latest")["flow_run_id"]
    page.goto(f"{world.facts['prefect_ui_url']}/runs/flow-run/{run}")
    page.get_by_text("Artifacts", exact=True).last.click()
    page.get_by_text(key, exact=True).last.click()
    page.get_by_text(words).first.wait_for()
    page.screenshot(path=SHOTS / f"{key}.png", full_page=True)


def test_the_cleanup_stands_as_scheduled_for_its_hour(world: World, page: playwright.Page) -> None:
    """The run of the cleanup deployment is there, scheduled two days ahead."""
    api = PrefectApi(world.facts["prefect_api_url"])
    deployment = api.get("/deployments/name/cleanup-old-keys/sandbox")
    runs = api.post("/flow_runs/filter", {"deployments": {"id": {"any_": [deployment["id"]]}}})
    assert [run["state"]["type"] for run in runs] == ["SCHEDULED"]
    page.goto(f"{world.facts['prefect_ui_url']}/runs/flow-run/{runs[0]['id']}")
    page.get_by_text("Scheduled").first.wait_for()
    page.screenshot(path=SHOTS / "cleanup.png")
