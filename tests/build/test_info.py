"""`cnnfast info`'s facts agree with what is there. Fails when a fact is stale, missing, or not JSON."""

import json

import torch

from cnnfast import _library, info, ops


def test_facts_are_json_and_true():
    facts = json.loads(json.dumps(info.collect()))
    assert facts["machine"]["torch"] == torch.__version__
    assert facts["build"]["isas"] == _library._C.isas_built
    assert facts["machine"]["isa_in_use"] in facts["build"]["isas"]
    assert bool(facts["build"]["nvcc"]) == bool(facts["build"]["cuda_arches"])


def test_each_op_is_there_with_its_choice_and_reasons():
    facts = info.op_facts()
    names = {name.removesuffix("_packed") for name in ops.__all__ if not name.startswith("pack_")}
    assert set(facts) == names - {"can_run"}
    for op, fact in facts.items():
        assert fact["takes"]["cpu"] == "cpu"
        for backend, why in fact["why_not"].items():
            assert why == ops.can_run(op, backend) and all(why)
        if not torch.cuda.is_available():
            assert {"cuda", "triton"} <= set(fact["why_not"])


def test_text_names_what_a_person_looks_for():
    text = info.render()
    build = info.build_facts()
    for expected in (build["torch_headers"], torch.__version__, *build["isas"]):
        assert expected in text
    for op in info.OPS:
        assert op in text
