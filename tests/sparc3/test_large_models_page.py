"""docs/large-models.md against the dry runs that its numbers come from: Llama 3 70B's config, no weights."""

import json
import re
from pathlib import Path

import pytest
from commands import run, succeed_json

from sparc3.plan import Budget, plan
from sparc3.shape import Shape
from sparc3.sizes import size

PAGE = (Path(__file__).parents[2] / "docs/large-models.md").read_text(encoding="utf-8")
# As the page gives it.
CONFIG = json.loads(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1])
COMMAND = re.search(r"^sparc3 prune (.*?)\n```", PAGE, re.DOTALL | re.MULTILINE)[1]
VOCABULARY = CONFIG["vocab_size"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama-3-70b")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def asked(folder):
    """The page's own command, for the folder, without what a dry run does not read."""
    words = COMMAND.replace("\\\n", " ").split()
    words[0] = folder
    for option in ("--out", "--offload-dir", "--text"):
        place = words.index(option)
        del words[place : place + 2]
    words.remove("--resume")
    return ["prune", *words, "--dry-run"]


@pytest.fixture(scope="module")
def recipe(asked):
    return succeed_json(*asked)["plan"]


def totals(found):
    """What the command calls at most at once, in bytes; the process of the host differs from machine to machine."""
    return {
        "device": found["totals"]["device"],
        "host": found["totals"]["host"] - found["host"]["process"],
        "disk": found["totals"]["disk"],
    }


def test_the_table_is_that_of_the_dry_run(recipe):
    rows = []
    for part in dict.fromkeys([*recipe["device"], *recipe["host"], *recipe["disk"]]):
        counts = [recipe[where].get(part, 0) for where in ("device", "host", "disk")]
        if part == "process":
            counts[1] = 0
        if any(counts):
            rows.append([part, *(size(count) if count else "" for count in counts)])
    rows.append(["at most at once", *(size(count) for count in totals(recipe).values())])
    table = re.search(r"\| what \| device \| host \| disk \|\n\|[-:| ]*\|\n(.*?)\n\n", PAGE, re.DOTALL)[1]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()] == rows


def sentence(pattern):
    """The groups of a pattern that the page has once, whatever its line breaks."""
    found = re.findall(pattern, " ".join(PAGE.split()))
    assert len(found) == 1, (pattern, found)
    return found[0] if isinstance(found[0], tuple) else (found[0],)


def test_bytes_and_operations(recipe):
    read, written, operations = sentence(
        r"reads ([\d.]+ GiB) .*? writes ([\d.]+ GiB) and takes ([\d,]+) TFLOP"
    )
    assert (read, written) == (size(recipe["read"]), size(recipe["written"]))
    tera = recipe["operations"] / 1e12
    assert int(operations.replace(",", "")) == pytest.approx(tera, rel=1e-3)
    rate, minutes = sentence(r"at (\d+) TFLOP a second they are (\d+) minutes")
    assert int(minutes) == round(tera / int(rate) / 60)
    speed, minutes = sentence(r"reading at (\d+) GiB a second is ([\d.]+) minutes")
    assert float(minutes) == pytest.approx(recipe["read"] / 2**30 / int(speed) / 60, abs=0.05)
    speed, minutes = sentence(r"writing at (\d+) GiB a second is ([\d.]+) minutes")
    assert float(minutes) == pytest.approx(recipe["written"] / 2**30 / int(speed) / 60, abs=0.05)


def test_the_least_that_suffices(asked):
    (device,) = sentence(r"the least is `--max-memory (\d+MiB)`")
    words = ["1GiB" if word == "20GiB" else word for word in asked]
    assert f"this needs {device} at least" in run(*words).stderr
    words = [device if word == "20GiB" else word for word in asked]
    assert not succeed_json(*words)["plan"]["prefetch"]


def changed(asked, option, value):
    words = list(asked)
    if option in words:
        words[words.index(option) + 1] = value
    else:
        words += [option, value]
    return succeed_json(*words)["plan"]


def test_what_to_change_where_something_is_short(asked, recipe):
    fewer = changed(asked, "--samples", "12")
    host, disk = sentence(r"`--samples 12` .*? ([\d.]+ GiB) of host memory and ([\d.]+ GiB) of disk")
    assert not fewer["on_disk"]
    assert (host, disk) == (size(totals(fewer)["host"]), size(fewer["totals"]["disk"]))

    wanda = changed(asked, "--method", "wanda")
    host, disk, operations = sentence(
        r"`--method wanda` .*? ([\d.]+ GiB) of host memory, ([\d.]+ GiB) of disk and ([\d,]+) TFLOP"
    )
    assert (host, disk) == (size(totals(wanda)["host"]), size(wanda["totals"]["disk"]))
    assert int(operations.replace(",", "")) == pytest.approx(wanda["operations"] / 1e12, rel=1e-3)

    everywhere = changed(asked, "--pattern", "global")
    (scores,) = sentence(r"`--pattern global` .*? ([\d.]+ GiB) of scores")
    assert scores == size(everywhere["disk"]["scores"])
    assert everywhere["visits"] == 240


def test_a_disk_that_is_smaller(recipe):
    free, every, disk, more = sentence(
        r"With (\d+) GiB free it keeps every (\d+)th boundary.*? ([\d.]+ GiB) of disk and (\d+) % more arithmetic"
    )
    budget = Budget(20 << 30, 56 << 30, int(free) << 30, recipe["host"]["process"], True)
    way = plan(Shape(**recipe["shape"]), "lrp", "row", budget, VOCABULARY)
    assert (way.on_disk, way.spacing) == (True, int(every))
    assert disk == size(way.disk_bytes)
    assert int(more) == round(100 * (way.operations / recipe["operations"] - 1))
    assert way.disk_bytes < int(free) << 30 < recipe["totals"]["disk"]
