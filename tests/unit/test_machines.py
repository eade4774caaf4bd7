"""A job looks for the cluster that this machine has noted, and does not wait for one that is gone."""

import socket

from dpo_ray.machines import listens


def test_an_address_listens_until_its_socket_is_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert listens(address)
    assert not listens(address)
