"""TLS on both ports and towards the model server, as the settings say."""

import ssl
from pathlib import Path

from serving.gateway.settings import BadSettings, Settings


def server_context(settings: Settings, protocol: str) -> ssl.SSLContext | None:
    """For a port that speaks this protocol (``http/1.1`` or ``h2``, as ALPN has them); None without TLS.

    Raises:
        BadSettings: A file is not what it should be.
    """
    if settings.tls_cert_file is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols([protocol])
    try:
        context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file)
    except (OSError, ssl.SSLError) as err:
        raise BadSettings(
            f"DIGITS_TLS_CERT_FILE={str(settings.tls_cert_file)!r}: expected a certificate chain in PEM, its key in "
            f"DIGITS_TLS_KEY_FILE={str(settings.tls_key_file)!r} ({err})"
        ) from err
    if settings.tls_client_ca_file is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        _load_authorities(context, settings.tls_client_ca_file, "DIGITS_TLS_CLIENT_CA_FILE")
    return context


def upstream_context(settings: Settings) -> ssl.SSLContext | None:
    """For calls to the model server; None for plain gRPC.

    Raises:
        BadSettings: A file is not what it should be.
    """
    if not settings.upstream_tls:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # it checks the server's certificate and name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    if settings.upstream_ca_file is None:
        context.load_default_certs()
    else:
        _load_authorities(context, settings.upstream_ca_file, "DIGITS_UPSTREAM_CA_FILE")
    if settings.upstream_cert_file is not None:
        try:
            context.load_cert_chain(settings.upstream_cert_file, settings.upstream_key_file)
        except (OSError, ssl.SSLError) as err:
            raise BadSettings(
                f"DIGITS_UPSTREAM_CERT_FILE={str(settings.upstream_cert_file)!r}: expected a certificate chain in PEM, "
                f"and its key in DIGITS_UPSTREAM_KEY_FILE ({err})"
            ) from err
    return context


def _load_authorities(context: ssl.SSLContext, file: Path, variable: str) -> None:
    try:
        context.load_verify_locations(file)
    except (OSError, ssl.SSLError) as err:
        raise BadSettings(f"{variable}={str(file)!r}: expected certificates in PEM ({err})") from err
