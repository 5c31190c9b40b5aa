import pathlib

from tests.eplb.moving.weights import EXAMPLE

DOCUMENT = pathlib.Path(__file__).parents[3] / "docs" / "eplb" / "moving.md"


def test_the_example_of_the_document_is_the_one_that_is_tried():
    text = DOCUMENT.read_text()
    for which in ("old", "new"):
        assert f"\n| {which} | {' | '.join(map(str, EXAMPLE[which]))} |\n" in text
    held = " ".join(map(str, EXAMPLE["after"]))
    assert f"the slots hold `{held[:5]} | {held[6:]}`" in text
