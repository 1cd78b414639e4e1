"""The file that `llmchain-fed federate` reads, as the example shows it. What it refuses: test_nvflare, security/."""

import re
from pathlib import Path

from llmchain_fed.runtimes.federation_file import FederationFile, HubOptions

EXAMPLE = Path(__file__).parents[2] / "examples" / "federation" / "federation.yaml"


def test_the_example_reads_and_names_every_option(tmp_path):
    short = FederationFile.read(EXAMPLE)
    assert (short.rounds, short.hub.sites) == (3, ("org-a", "org-b", "org-c"))
    text = re.sub(r"^(\s*)# (?=[a-z_]+: )", r"\1", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    whole = tmp_path / "federation.yaml"
    whole.write_text(text, encoding="utf-8")
    found = FederationFile.read(whole)
    assert found.model_fields_set == FederationFile.model_fields.keys() - {
        "optimizer",
        "evaluation",
        "columns",
        "transforms",
        "gradient_step",
        "batch_sampler",
    }  # no file stores them
    assert found.hub.model_fields_set == HubOptions.model_fields.keys()
    for name in ("quorum", "retries", "keep_checkpoints", "aggregation", "weighting", "seed"):
        assert getattr(found, name) == FederationFile.model_fields[name].default, name
    assert (found.samples, short.samples) == (0, None)  # None is 0 at sites
    for name in ("patience", "startup", "recovery"):
        assert getattr(found.hub, name) == HubOptions.model_fields[name].default, name
