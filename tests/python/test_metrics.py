"""``/metrics`` as Prometheus's own parser reads it."""

from __future__ import annotations

import re

from prometheus_client.openmetrics.parser import text_string_to_metric_families
from running import ROOT, Sim, ask, generate
from sglang_router_rs import Router


def test_the_text_is_open_metrics_and_the_page_names_what_is_in_it(sim: Sim) -> None:
    with Router(sim.urls, port=0, log_level="off", prometheus_duration_buckets=[0.5, 2]) as router:
        assert router.wait_ready()
        generate(router.url)
        ask(f"{router.url}/generate", {"text": "hi", "stream": True, "model": 'odd "name"\\\n'})
        ask(f"{router.url}/generate", headers={"x-request-id": "get"})
        answer = ask(f"{router.url}/metrics")
    families = list(text_string_to_metric_families(answer.body.decode()))
    names = [family.name for family in families]
    assert len(names) == len(set(names)) > 30
    row = re.compile(r"^\| `(\w+)` \| (\w+) \| ([^|]*) \|", re.MULTILINE)
    page = (ROOT / "docs/metrics.md").read_text()
    known = {name: (kind, set(re.findall(r"\w+", labels))) for name, kind, labels in row.findall(page)}
    for family in families:
        kind, labels = known[family.name + "_total" * (family.type == "counter")]
        assert (kind, bool(family.documentation)) == (family.type, True)
        assert all(sample.labels.keys() - {"le"} == labels for sample in family.samples)
    models = {sample.labels.get("model") for family in families for sample in family.samples}
    assert {"default", 'odd "name"\\\n'} <= models
