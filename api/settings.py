"""Settings of the API server alone. All other settings are in catalog.settings."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

from pydantic import Field, field_validator

from catalog.settings import EnvironmentSettings
from catalog.webhooks.url_policy import Rules, networks_of


class ApiSettings(EnvironmentSettings):
    """Settings from environment variables LORRY_…, read once at start."""

    allowed_hosts: str = Field(
        default="", description="Host names, separated by commas, under which clients may address the API server."
    )
    public_url: str | None = Field(
        default=None, description="Public URL of the service behind a proxy, such as https://lorry.example.com."
    )
    trusted_proxies: str = Field(
        default="",
        description="Networks, separated by commas, of reverse proxies whose X-Forwarded-For is trusted.",
    )
    max_body_bytes: int = Field(
        default=2**20, ge=1024, description="Maximum size of a request body, except file uploads, in bytes."
    )
    requests_per_minute: int = Field(
        default=600,
        ge=0,
        description="Rate limit of each API key without a limit of its own. 0: no limit, also for failed "
        "authentications.",
    )
    jobs_per_day: int = Field(
        default=0, ge=0, description="Jobs that each API key without a limit of its own may create a day. 0: no limit."
    )
    webhook_allowed_networks: str = Field(
        default="", description="Networks, separated by commas, that webhooks may reach although they are not public."
    )
    webhook_allow_http: bool = Field(default=False, description="Allow http:// URLs for webhooks.")
    stream_poll_seconds: float = Field(
        default=0.25, gt=0, description="Interval at which live streams poll the database, in seconds."
    )
    stream_heartbeat_seconds: float = Field(
        default=15, gt=0, description="Interval of the comments on an idle stream, in seconds."
    )
    shutdown_seconds: int = Field(
        default=10, ge=1, description="Time that running requests have to finish at shutdown, in seconds."
    )

    @field_validator("webhook_allowed_networks", "trusted_proxies")
    @classmethod
    def _are_networks(cls, text: str) -> str:
        networks_of(text)
        return text

    def webhook_rules(self) -> Rules:
        return Rules(networks=networks_of(self.webhook_allowed_networks), allow_http=self.webhook_allow_http)

    def proxy_networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """Return the networks of reverse proxies whose `X-Forwarded-For` is trusted."""
        return networks_of(self.trusted_proxies)

    def named_hosts(self) -> list[str]:
        return [name for name in (part.strip().lower() for part in self.allowed_hosts.split(",")) if name]
