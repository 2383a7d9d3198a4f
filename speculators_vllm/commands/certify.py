"""``speculators certify``: certifies a lossless speculator."""

import sys
from contextlib import nullcontext
from typing import Annotated

from cyclopts import Parameter

from speculators_core.console import console, result_alone_on_stdout
from speculators_vllm import offline
from speculators_vllm.verdicts.settings import CertifyConfig

NOT_CERTIFIED_EXIT = 1


def run(
    speculator: str,
    /,
    *,
    config: Annotated[CertifyConfig | None, Parameter(name="*")] = None,
) -> None:
    """Certify that a speculator, served by vLLM, leaves its verifier's output unchanged.

    Exit code 0: certified. 1: not certified, with the first fault. 2: it could not be tested.

    Parameters
    ----------
    speculator
        Folder or hub id.
    """
    config = config or CertifyConfig()
    with result_alone_on_stdout() if config.as_json else nullcontext():
        offline.prepare(config.verbose)
        with offline.quiet():
            from speculators_vllm.verdicts.certificate import print_certificate, write_certificate
            from speculators_vllm.verdicts.certify import certify

        certificate = certify(speculator, config)
        if not config.as_json:
            print_certificate(certificate, console)
        if config.output is not None:
            written = write_certificate(certificate, config.output)
            console.print(f"wrote {' and '.join(map(str, written))}")
    if config.as_json:
        sys.stdout.write(certificate.model_dump_json(indent=1) + "\n")
    if certificate.faults:
        more = f" (and {len(certificate.faults) - 1} more)" if len(certificate.faults) > 1 else ""
        sys.stderr.write(f"not certified: {certificate.faults[0]}{more}\n")
        sys.exit(NOT_CERTIFIED_EXIT)
