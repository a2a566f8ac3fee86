"""What backward keeps, counted on models without numbers."""

import pytest
from benchmarks.cases import Case, Setting
from benchmarks.kept import KeptSubject
from benchmarks.methods import CURRENT, load_hosts

load_hosts(CURRENT)
TOKENS = 2 * 8
# Of the tiny Llama's two blocks, whose layers see 64 features, the last one 128: q, k and v share an input, gate and up
# share one, and attention itself keeps what o_proj sees.
SHARED = 2 * (64 + 64 + 128)


@pytest.fixture(scope="module")
def subject():
    return KeptSubject(Case("alive", {"model": "tiny", "batch": 2, "seq": 8, "base": "plain"}, "float32"))


@pytest.mark.parametrize("variant", ["bat-row", "bat-col"])
def test_layers_that_share_an_input_keep_one_x(subject, variant):
    kept = subject.prepare(Setting(variant, 16))()
    assert kept["inputs_mib"] == kept["needed_mib"] == TOKENS * SHARED * 4 / 2**20
    assert kept["sums_mib"] == kept["blocks_mib"] == kept["others_mib"] == 0


def test_what_is_kept_is_what_the_model_keeps_more_than_its_base(subject):
    kept = subject.prepare(Setting("dora", 16))()
    base = subject.prepare(Setting("frozen", 0, 0))()["kept_mib"]
    kinds = sum(kept[f"{kind}_mib"] for kind in ("inputs", "sums", "blocks", "others"))
    assert kept["kept_mib"] - base == pytest.approx(kinds)
    assert kept["others_mib"] > kept["needed_mib"]
