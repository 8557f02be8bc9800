"""sync-trackio sends tokens where the user says, and to no address out of a file."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from smolquant.errors import InputError
from smolquant.report.console import Console
from smolquant.tracking import sync


@pytest.mark.fault(
    "secret",
    "`sync-trackio` is given no address, and the events name one",
    "Exit 2 with the command to run; nobody is contacted.",
)
@pytest.mark.parametrize(
    ("recorded", "said", "next_step"),
    [
        ("https://evil.example/?write_token=x", "names https://evil.example.", "evil.example`"),
        ("you/dashboard", "names you/dashboard.", "--trackio-url you/dashboard`"),
        (None, "names none.", "--trackio-url URL`"),
        ("http://u:p@evil.example", "names none.", "--trackio-url URL`"),
        ({"url": "https://evil.example"}, "names none.", "--trackio-url URL`"),
    ],
)
def test_an_address_in_the_events_gets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: Any, said: str, next_step: str
) -> None:
    def contact(*_: object, **__: object) -> None:
        pytest.fail("it was contacted")

    # By its names, as the package has a function of the module's name.
    monkeypatch.setitem(sync.__globals__, "TrackioProcess", contact)
    job = {"event": "job", "id": "a", "project": "p", "group": "g", "address": recorded}
    (tmp_path / "events.jsonl").write_text(json.dumps(job) + "\n")
    with pytest.raises(InputError) as refused:
        sync(tmp_path, None, console=Console({}, io.StringIO()), environ={}, hub_token="hf_a")
    assert said in refused.value.message
    assert refused.value.hint.endswith(f"{next_step}.")
    assert f"sync-trackio {tmp_path} --trackio-url" in refused.value.hint
