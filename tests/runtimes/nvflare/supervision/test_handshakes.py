"""What is said right after a handshake arrives, however long the other side takes to note whose connection it is.

Belongs here: two of NVFlare's own communicators over loopback. Does not: engines (test_supervisor_federation).
"""

import threading
import time

import pytest
from federation_processes import free_port
from nvflare.fuel.f3.communicator import Communicator
from nvflare.fuel.f3.drivers.connector_info import Mode
from nvflare.fuel.f3.endpoint import Endpoint, EndpointMonitor, EndpointState
from nvflare.fuel.f3.message import Message, MessageReceiver
from nvflare.fuel.f3.sfm.conn_manager import ConnManager

from llmchain_fed.runtimes.nvflare.supervision.handshakes import FramesInOrder

APP, MESSAGES = 7, 20


class SpeaksAtOnce(EndpointMonitor):
    """Says everything it has to say in the moment in which it is answered."""

    def __init__(self, communicator):
        self.communicator = communicator

    def state_change(self, endpoint):
        if endpoint.state == EndpointState.READY:
            for number in range(MESSAGES):
                self.communicator.send(endpoint, APP, Message({"number": number}, b"hello"))


class Hears(MessageReceiver):
    """Each handler waits for all others: nobody's order may outlive the handshake."""

    def __init__(self):
        self.heard, self.all = [], threading.Event()

    def process_message(self, endpoint, connection, app_id, message):
        self.heard.append((endpoint.name, message.headers["number"]))
        if len(self.heard) == MESSAGES:
            self.all.set()
        self.all.wait(5)


@pytest.fixture
def talk(monkeypatch):
    """`talk(in_order)`: what a hub hears of a site that speaks at once, while it notes the site's name slowly."""
    started = []

    def slowly(manager, connection, data, named=ConnManager.update_endpoint):
        if connection.conn.connector.mode == Mode.PASSIVE:
            time.sleep(0.3)  # as a guard who reads a list
        named(manager, connection, data)

    def run(in_order):
        monkeypatch.setattr(ConnManager, "process_frame", ConnManager.process_frame)
        monkeypatch.setattr(ConnManager, "update_endpoint", slowly)
        if in_order:
            FramesInOrder().install()
        url, hears = f"http://127.0.0.1:{free_port()}", Hears()
        hub, site = Communicator(Endpoint("hub")), Communicator(Endpoint("site"))
        started.extend([hub, site])
        hub.register_message_receiver(APP, hears)
        hub.add_connector(url, Mode.PASSIVE)
        hub.start()
        site.register_monitor(SpeaksAtOnce(site))
        site.add_connector(url, Mode.ACTIVE)
        site.start()
        hears.all.wait(10 if in_order else 3)
        assert hub.find_endpoint("site"), "they never met"
        return sorted(hears.heard)

    yield run
    for communicator in started:
        communicator.stop()


def test_nothing_is_lost_between_the_answer_to_a_handshake_and_the_name(talk):
    assert talk(in_order=True) == [("site", number) for number in range(MESSAGES)]


def test_nvflare_by_itself_loses_it_else_this_is_no_longer_needed(talk):
    assert talk(in_order=False) == []
