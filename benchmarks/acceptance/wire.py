"""Settings of servers to measure."""

from typing import TYPE_CHECKING

from pydantic import Field

from speculators_core.settings import Settings

if TYPE_CHECKING:
    from speculators_core.http import Access


class ServerConfig(Settings):
    """Running servers to measure, instead of an engine in this process."""

    base_url: str | None = None
    """URL of a vLLM server with a speculator, http://host:port; it decides draft, K and dtype."""
    baseline_url: str | None = None
    """URL of the same server without speculation, to compare speed and outputs with."""
    api_key: str | None = Field(None, exclude=True, repr=False)
    """API key of the servers; the variable `OPENAI_API_KEY` if not set."""
    timeout_s: float = Field(300.0, gt=0)
    """Longest silence of a server, in seconds, before a request counts as failed."""

    def access(self, url: str, connections: int = 1) -> "Access":
        from speculators_core.http import Access  # httpx is for those who ask a server alone

        return Access(url, self.api_key, self.timeout_s, connections)
