"""Options of a measurement at running servers, and how these are asked."""

from typing import TYPE_CHECKING

from pydantic import Field

from speculators_core.settings import Settings

if TYPE_CHECKING:
    from speculators_core.http import Access


class ServerConfig(Settings):
    """Which servers are asked."""

    base_url: str | None = None
    """A running vLLM server with a speculator, http://host:port; it decides draft, K and dtype."""
    baseline_url: str | None = None
    """The same server without speculation: what speed and outputs are compared with."""
    api_key: str | None = Field(None, exclude=True, repr=False)
    """API key of the servers; OPENAI_API_KEY where none is given."""
    timeout_s: float = Field(300.0, gt=0)
    """Longest silence of a server before a request counts as failed."""

    def access(self, url: str, connections: int = 1) -> "Access":
        from speculators_core.http import Access  # httpx is for those who ask a server alone

        return Access(url, self.api_key, self.timeout_s, connections)
