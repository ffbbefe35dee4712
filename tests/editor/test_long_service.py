"""The short form of long_service.py."""
import long_service


def test_mixed_clients_lose_nothing_and_leave_nothing(tmp_path):
    service = long_service.serve(tmp_path, jobs=160, clients=4)
    assert service.done >= 150
    # So few jobs tell of threads and sockets; of memory the long form tells.
    for what in ("files", "sockets", "threads"):
        values = [sample[what] for sample in service.samples]
        assert values[-1] <= values[len(values) // 5] + 8, (what, values)
