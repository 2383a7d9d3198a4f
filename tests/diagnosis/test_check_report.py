"""The report of `speculators check` is read back as it was written."""

import json

import pytest
from pydantic import ValidationError

from speculators_core.diagnosis.check_report import CheckReport, Counts


def make_report() -> CheckReport:
    report = CheckReport(speculator="draft", stages=[("fc", 0.0), ("logits", None)])
    report.served = Counts(num_drafts=2, accepted_per_position=[1, 0], acceptance_length=1.5)
    report.add("note", "stock vLLM", "serves it")
    return report


def test_a_report_without_faults_is_fit():
    assert make_report().verdict == "fit to serve"


def test_a_report_is_read_back_and_its_verdict_is_written():
    report = make_report()
    report.add("fault", "reading", "off by one", "d2t offset")
    report.add("fault", "tensors", "fc differs", "served otherwise")
    report.add("fault", "acceptance", "texts differ", "served otherwise")
    text = report.model_dump_json()
    assert CheckReport.model_validate_json(text) == report
    assert json.loads(text)["verdict"] == "not fit to serve: d2t offset, served otherwise"


def test_a_cause_that_check_cannot_name_is_refused():
    with pytest.raises(ValidationError, match="dead draft"):
        make_report().add("fault", "reading", "text", "bad luck")
