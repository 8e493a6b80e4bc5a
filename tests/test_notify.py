"""Messages to real servers: webhooks that work, refuse, redirect or drip; mail with and without encryption."""

import datetime as dt
import json
import subprocess

import pytest
from listener import Listener
from waiting import TIMEOUT_SECONDS

from mlnb.monitoring import notify
from mlnb.monitoring.alerts import AlertStore
from mlnb.monitoring.channels import CHANNEL_KINDS, Notification, SlackChannel, WebhookChannel, load_channels
from mlnb.monitoring.notify import send_all
from mlnb.monitoring.rules import RULE_KINDS, RuleResult, from_table
from mlnb.project.errors import SettingError
from mlnb.project.settings import load_settings
from mlnb.records import Records
from mlnb.records import utc_now as now

ALERT = {
    "id": 3,
    "rule": "inputs",
    "subject": "distance",
    "severity": "warning",
    "what": "firing",
    "words": "distance moved <far>",
}
MESSAGE = Notification("flights", [ALERT])


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.mlnb]\n")
    return load_settings(tmp_path)


def sent(channels, settings, patience=TIMEOUT_SECONDS):
    deliveries = send_all([(channel, MESSAGE) for channel in channels], settings, patience)
    return {name: delivery.error for name, delivery in deliveries.items()}


def test_webhooks(settings, monkeypatch):
    with Listener() as plain, Listener() as slack:
        monkeypatch.setenv("PLAIN", plain.url)
        monkeypatch.setenv("SLACK", slack.url)
        assert sent([WebhookChannel(name="a", url="$PLAIN"), SlackChannel(name="b", url="$SLACK")], settings) == {
            "a": None,
            "b": None,
        }
    (document,), (text,) = plain.got, slack.got
    assert document["alerts"][0]["subject"] == "distance" and document["project"] == "flights" and document["more"] == 0
    assert text == {"text": "*flights: distance moved &lt;far&gt; [inputs, alert 3]*\n    mlnb alerts open 3"}


def test_a_dead_channel_is_in_nobodys_way_and_tells_no_secret(settings, monkeypatch):
    with Listener() as good, Listener(500) as broken, Listener(302) as moved, Listener("drip") as drips:
        urls = {"GOOD": good.url, "BROKEN": broken.url, "MOVED": moved.url, "DRIPS": drips.url}
        urls |= {"NOBODY": "http://127.0.0.1:9/secret", "NO_URL": "secret"}
        urls |= {"ODD": "http://host\nsecret/", "NO_HOST": "http://[secret"}
        for name, url in urls.items():
            monkeypatch.setenv(name, url)
        hook = lambda name: WebhookChannel(name=name, url=f"${name}")
        errors = sent([hook(name) for name in (*urls, "UNSET") if name != "DRIPS"], settings)
        errors |= sent([hook("DRIPS")], settings, patience=2.0)
    assert errors["GOOD"] is None and len(good.got) == 1 and len(moved.got) == 1
    assert errors["BROKEN"] == "the server answers 500" and errors["MOVED"] == "the server answers 302"
    assert "not finished within 2 seconds" in errors["DRIPS"] and "not answer" in errors["NOBODY"]
    assert (
        "does not hold a URL" in errors["NO_URL"]
        and "UNSET is not set" in errors["UNSET"]
        and errors["ODD"]
        and errors["NO_HOST"]
    )
    assert not any("secret" in (error or "") for error in errors.values())


class Box:
    def __init__(self):
        self.got = []

    async def handle_DATA(self, server, session, envelope):
        self.got.append(envelope)
        return "250 OK"

    async def handle_RCPT(self, server, session, envelope, address, options):
        if address.startswith("nobody"):
            return "550 no such mailbox"
        envelope.rcpt_tos.append(address)
        return "250 OK"


@pytest.fixture
def certificate(tmp_path, monkeypatch):
    "An SSL context of 127.0.0.1, trusted by this process"
    import ssl

    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    ask = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2"]
    subprocess.run(
        [*ask, "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


def mailbox(box, **more):
    controller = pytest.importorskip("aiosmtpd.controller")

    class Mailbox(controller.Controller):
        def _trigger_server(self):
            self.port = self.server.sockets[0].getsockname()[1]  # that the system chose
            super()._trigger_server()

    return Mailbox(box, hostname="127.0.0.1", port=0, ready_timeout=TIMEOUT_SECONDS, **more)


def email(server, **more):
    table = {
        "kind": "email",
        "server": f"127.0.0.1:{server.port}",
        "sender": "mlnb@example.org",
        "to": ["team@example.org"],
        **more,
    }
    return from_table(CHANNEL_KINDS, "channels", "mail", table)


def test_plain_mail(settings):
    box = Box()
    server = mailbox(box)
    server.start()
    try:
        assert sent([email(server, security="none")], settings) == {"mail": None}
        refused = sent([email(server, security="none", to=["nobody@example.org"])], settings)["mail"]
        channel = email(server, security="none", to=["nobody@example.org", "ada@example.org"])
        partial_result = send_all([(channel, MESSAGE)], settings)["mail"]
        insecure = sent([email(server)], settings)["mail"]
    finally:
        server.stop()
    text = box.got[0].content.decode()
    assert "Subject: [mlnb] flights: distance moved <far> [inputs, alert 3]" in text and "mlnb alerts open 3" in text
    assert (
        box.got[0].rcpt_tos == ["team@example.org"] and box.got[1].rcpt_tos == ["ada@example.org"] and len(box.got) == 2
    )
    assert "does not accept the mail" in refused and "does not accept the mail" in insecure
    assert (
        partial_result.error is None
        and partial_result.note
        == f"127.0.0.1:{server.port} accepts no mail for nobody@example.org; the others received it"
    )
    assert "does not answer" in sent([email(server)], settings)["mail"]


def test_mail_with_encryption_and_password(settings, certificate, monkeypatch):
    smtp = pytest.importorskip("aiosmtpd.smtp")
    box = Box()
    right = lambda server, session, envelope, mechanism, data: smtp.AuthResult(
        success=data.password == b"right", handled=False
    )
    server = mailbox(box, tls_context=certificate, authenticator=right, auth_required=True, require_starttls=True)
    server.start()
    try:
        monkeypatch.setenv("SMTP_PASSWORD", "right")
        assert (
            sent([email(server, user="mlnb", password="$SMTP_PASSWORD")], settings) == {"mail": None}
            and len(box.got) == 1
        )
        monkeypatch.setenv("SMTP_PASSWORD", "wrong-secret")
        error = sent([email(server, user="mlnb", password="$SMTP_PASSWORD")], settings)["mail"]
        monkeypatch.delenv("SSL_CERT_FILE")
        unknown = sent([email(server, user="mlnb", password="$SMTP_PASSWORD")], settings)["mail"]
    finally:
        server.stop()
    assert "SMTPAuthenticationError 535" in error and "secret" not in error and len(box.got) == 1
    assert "certificate" in unknown.lower()


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"kind": "pager"}, "has kind 'pager'"),
        ({}, 'has no kind; write kind = "webhook"'),
        ({"kind": ["log"]}, "has kind ['log']"),
        ({"kind": "webhook"}, 'is missing; write url = "$OPS_WEBHOOK"'),
        ({"kind": "webhook", "url": "http://a/secret"}, 'holds a secret; write url = "$OPS_WEBHOOK"'),
        ({"kind": "log", "quiet_hour": "22:00-07:00"}, "unknown setting 'quiet_hour' (did you mean 'quiet_hours'?)"),
        ({"kind": "log", "quiet_hours": "22-7"}, 'write quiet_hours = "22:00-07:00"'),
        ({"kind": "log", "time_zone": "Mars/Base"}, 'write time_zone = "Europe/Vienna"'),
        ({"kind": "email", "server": "host"}, 'write server = "smtp.example.org:587"'),
        (
            {"kind": "email", "server": "host:25", "sender": "a@b", "to": ["c\r\nBcc: d@e"]},
            'write to = ["team@example.org"]',
        ),
        (
            {"kind": "email", "server": "host:25", "sender": "a@b", "to": ["c@d"], "user": "x", "password": "secret"},
            "holds a secret",
        ),
        ({"kind": "email", "security": "ssl"}, 'write security = "starttls", "tls" or "none"'),
    ],
)
def test_a_wrong_channel_is_a_sentence_without_its_secret(table, expected):
    with pytest.raises(SettingError) as error:
        from_table(CHANNEL_KINDS, "channels", "ops", table)
    assert (
        expected in str(error.value)
        and "[tool.mlnb.channels.ops]" in str(error.value)
        and "/secret" not in str(error.value)
    )


def rule_result(*subjects, severity="warning"):
    rule = from_table(RULE_KINDS, "alerts", "inputs", {"kind": "drift", "severity": severity})
    return RuleResult(rule, now(), [rule.finding(s, f"{s} moved") for s in subjects], {})


def deliveries(settings, hour):
    "What is told at an hour of a summer's day in UTC"
    alerts, (channel,) = (
        AlertStore(Records(f"sqlite:///{settings.root}/records.db"), "p"),
        load_channels(settings).values(),
    )
    done = notify.notify(alerts, {channel.name: channel}, settings, dt.datetime(2026, 7, 1, hour))
    alerts.close()
    return (
        [a["words"] for a in json.loads((settings.root / "log.jsonl").read_text().splitlines()[-1])["alerts"]]
        if done
        else []
    )


def test_quiet_hours(tmp_path):
    table = '[tool.mlnb.channels.ops]\nkind = "log"\nfile = "log.jsonl"\n'
    table += 'quiet_hours = "22:00-07:00"\ntime_zone = "Europe/Vienna"\n'
    (tmp_path / "pyproject.toml").write_text(table)
    settings, alerts = load_settings(tmp_path), AlertStore(Records(f"sqlite:///{tmp_path}/records.db"), "p")
    alerts.record([rule_result("a", "b")], ["ops"])
    assert deliveries(settings, 23) == []
    alerts.resolve(1, "ada")  # over before anybody was told
    assert deliveries(settings, 4) == [] and deliveries(settings, 5) == ["b moved"] and deliveries(settings, 6) == []
    alerts.record([rule_result("c", severity="critical")], ["ops"])
    assert deliveries(settings, 23) == ["c moved"]
    alerts.close()


def test_many_alerts_are_one_message(settings):
    alerts = AlertStore(Records(f"sqlite:///{settings.root}/records.db"), "p")
    alerts.record([rule_result(*map(str, range(2000)))], ["log"])
    assert notify.notify(alerts, load_channels(settings), settings)["log"].alerts == 2000
    (line,) = settings.path(".mlnb/alerts.jsonl").read_text().splitlines()
    document = json.loads(line)
    assert (
        document["headline"] == "p: 2,000 alerts fired" and len(document["alerts"]) == 100 and document["more"] == 1900
    )
    assert notify.notify(alerts, load_channels(settings), settings) == {}
    alerts.close()


def test_a_mailbox_that_is_no_more_does_not_have_the_others_told_again(settings):
    box = Box()
    server = mailbox(box)
    server.start()
    channel = email(server, security="none", to=["nobody@example.org", "ada@example.org"])
    alerts = AlertStore(Records(f"sqlite:///{settings.root}/records.db"), "p")
    try:
        alerts.record([rule_result("a")], ["mail"])
        first, second = (notify.notify(alerts, {"mail": channel}, settings) for _ in range(2))
    finally:
        server.stop()
    assert "accepts no mail for nobody@example.org" in first["mail"].note and second == {} and len(box.got) == 1
    (delivery,) = alerts.get(1)["deliveries"]
    assert delivery["status"] == "sent" and "nobody@example.org" in delivery["error"]
    alerts.close()
