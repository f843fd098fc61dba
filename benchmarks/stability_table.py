"""Accuracy, stability and flips of the bundled model on `stdlib-cloze`, cut in three ways."""

from __future__ import annotations

from common import keep

import secateur
from secateur.evaluation.tasks import TaskRequest

CUTS = (("sleb", 2, {}), ("last-n", 2, {}), ("streamline", 4, {"network": "none"}))


def main() -> None:
    """Put all questions to the dense model and to each cut, in one run for each cut."""
    model = secateur.open_model("bundled")
    for method, blocks, settings in CUTS:
        plan = secateur.make_plan(model, method=method, blocks=blocks, texts="python-stdlib", settings=settings)
        pruned = secateur.prune(model, plan)
        results = secateur.evaluate(pruned, against=model, tasks=TaskRequest.of("stdlib-cloze", stability=True))
        for role, name in (("against", "dense"), ("model", method)):
            own = [one for one in results if one.role == role]
            found = {one.measure: round(one.value, 4) for one in own}
            more = {"method": name} | ({"blocks": blocks, **settings} if role == "model" else {})
            (accuracy,) = (one for one in own if one.measure == "acc")
            keep(
                "stability_table",
                more,
                found | {"stderr": round(accuracy.spread["stderr"], 4), "questions": accuracy.settings["questions"]},
            )


if __name__ == "__main__":
    main()
