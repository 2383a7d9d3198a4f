"""Settings of a push to the hub."""

from typing import Annotated

from pydantic import Field

from speculators_core.flags import AsJson, Switch
from speculators_core.settings import Settings


class PushConfig(Settings):
    """Repository, names and what is sent."""

    private: Annotated[bool, Switch] = False
    """Make a new repository private. An existing one must be private already."""
    revision: str | None = Field(None, min_length=1)
    """Branch, which is created if there is none; the main branch if not set."""
    message: str | None = Field(None, min_length=1)
    """Commit message."""
    create_pr: Annotated[bool, Switch] = False
    """Open a pull request in an existing repository, instead of a commit."""
    verifier: str | None = None
    """Hub id of the verifier for the uploaded config and card; the local files stay as they are."""
    license: str | None = Field(None, min_length=1)
    """License in the uploaded card if the local card names none. Without a local card, one is
    generated from the checkpoint."""
    dry_run: Annotated[bool, Switch] = False
    """Check the folder and print what would be sent, without a token or network."""
    as_json: AsJson = False
    """Print the report as JSON."""
