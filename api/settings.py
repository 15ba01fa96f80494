"""What an operator may set of the HTTP face alone. Everything else is in catalog.settings."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from catalog.webhooks.url_policy import Rules, networks_of


class ApiSettings(BaseSettings):
    """By environment, LORRY_…, read once at start."""

    model_config = SettingsConfigDict(env_prefix="LORRY_", extra="ignore", frozen=True)

    allowed_hosts: str = Field(
        default="", description="Names, separated by commas, by which clients may address the api."
    )
    public_url: str | None = Field(
        default=None, description="Address before a proxy, such as https://lorry.example.com."
    )
    trusted_proxies: str = Field(
        default="",
        description="Networks, separated by commas, of reverse proxies whose X-Forwarded-For names the client.",
    )
    max_body_bytes: int = Field(default=2**20, ge=1024, description="Largest body of a request that uploads no file.")
    requests_per_minute: int = Field(
        default=600,
        ge=0,
        description="Of each API key without a limit of its own. 0: any number, and failed authentications too.",
    )
    jobs_per_day: int = Field(default=0, ge=0, description="Created by each API key, as above. 0: any number.")
    webhook_allowed_networks: str = Field(
        default="", description="Networks, separated by commas, that webhooks may go to although they are not public."
    )
    webhook_allow_http: bool = Field(default=False, description="Webhooks may go to http:// addresses too.")
    stream_poll_seconds: float = Field(default=0.25, gt=0, description="Between two polls of the database for streams.")
    stream_heartbeat_seconds: float = Field(default=15, gt=0, description="Between two comments on a silent stream.")
    shutdown_seconds: int = Field(
        default=10, ge=1, description="How long running requests may take to end at shutdown."
    )

    @field_validator("webhook_allowed_networks", "trusted_proxies")
    @classmethod
    def _are_networks(cls, text: str) -> str:
        networks_of(text)
        return text

    def webhook_rules(self) -> Rules:
        return Rules(networks=networks_of(self.webhook_allowed_networks), allow_http=self.webhook_allow_http)

    def proxy_networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """The reverse proxies whose `X-Forwarded-For` is believed."""
        return networks_of(self.trusted_proxies)

    def named_hosts(self) -> list[str]:
        return [name for name in (part.strip().lower() for part in self.allowed_hosts.split(",")) if name]
