"""What a queue owes to those who wait in it."""
import threading

from support import Server, long_prompt, quick, small_prompt, wait_until


def test_a_crash_loses_no_job(tmp_path):
    data = tmp_path / "data"
    server = Server(data)
    socket = server.socket()
    long = small_prompt(steps=200, steps_per_round=20)
    ids = [server.queue_prompt(long, socket.client_id)]
    ids += [server.queue_prompt(quick(), socket.client_id) for _ in range(3)]
    wait_until(lambda: [p for p in socket.of("progress") if p["node"] == "7" and p["value"] > 25])
    server.kill()

    with Server(data) as server:
        queue = server.get("/queue").json
        assert queue["queue_running"] == []
        assert [entry[1] for entry in queue["queue_pending"]] == ids
        jobs = server.get("/api/jobs?status=pending").json["jobs"]
        assert {job["id"] for job in jobs if job["paused"]} == set(ids)
        # a new job does not wait for those
        assert server.finished(server.queue_prompt(quick()))["status"]["completed"]
        assert server.get("/history").json.keys().isdisjoint(ids)
        log = (tmp_path / "data.log").read_text()
        assert "4 jobs" in log and "--resume" in log
        server.post("/api/queue", {"resume": True})
        for prompt_id in ids:
            assert server.finished(prompt_id, 600)["status"]["completed"]
        assert server.get("/queue").json["queue_pending"] == []

    with Server(data) as server:
        assert server.get("/queue").json["queue_pending"] == []


def test_running_and_waiting_jobs_are_canceled(server):
    socket = server.socket()
    running = server.queue_prompt(long_prompt(), socket.client_id)
    waiting = server.queue_prompt(quick(), socket.client_id)
    assert server.post(f"/api/jobs/{waiting}/cancel").json == {"cancelled": True}
    wait_until(lambda: [p for p in socket.of("progress") if p["node"] == "7" and p["max"] == 5000])
    assert server.post("/interrupt", {"prompt_id": waiting}).status == 200
    assert server.get("/queue").json["queue_running"], "another job's id stops nothing"
    steps = len(socket.of("progress"))
    server.post("/api/interrupt", {"prompt_id": running})
    wait_until(lambda: socket.of("execution_interrupted"))
    [told] = socket.of("execution_interrupted")
    assert (told["node_id"], told["node_type"]) == ("7", "EmLoop")
    assert len(socket.of("progress")) - steps <= 2
    jobs = server.get("/api/jobs").json["jobs"]
    assert {job["id"]: job["status"] for job in jobs} == {running: "cancelled", waiting: "cancelled"}


def test_200_jobs_of_20_clients_at_once(server):
    clients = [server.socket(f"client-{i}") for i in range(20)]
    ids, numbers, lock = {client.client_id: [] for client in clients}, {}, threading.Lock()

    def submit(client, rounds):
        for i in rounds:
            prompt = quick()
            prompt["2"]["inputs"]["filename_prefix"] = f"{client.client_id}/{i}"
            reply = server.post("/prompt", {"prompt": prompt, "client_id": client.client_id}).json
            with lock:
                ids[client.client_id].append(reply["prompt_id"])
                numbers[reply["prompt_id"]] = reply["number"]

    def all_submit(rounds):
        threads = [threading.Thread(target=submit, args=(client, rounds)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def done():
        history = server.get("/history").json
        return history if len(history) == len(numbers) else None

    all_submit([0])
    wait_until(done)
    before = server.resident_bytes()
    all_submit(range(1, 10))
    history = wait_until(done, 600)
    after = server.resident_bytes()
    assert len(history) == 200
    assert all(entry["status"]["completed"] for entry in history.values())
    assert [numbers[i] for i in history] == sorted(numbers.values()), "in the order of their acceptance"
    for client in clients:
        wait_until(lambda: len(client.of("execution_success")) == 10)
        heard = [event["data"]["prompt_id"] for event in client.events if "prompt_id" in event["data"]]
        assert set(heard) == set(ids[client.client_id]), "every client hears of its own jobs only"
        client.close()
    per_job = (after - before) / 180
    print(f"resident memory {before >> 20} MiB after 20 jobs, {after >> 20} MiB after 200: {per_job / 1024:.1f} KiB a job")
    assert per_job < 32 * 1024, "a job leaves its entry in the history, not its picture of 768 KiB"


def test_the_cache_can_be_emptied(server):
    prompt = small_prompt()
    server.finished(server.queue_prompt(prompt))
    assert server.post("/free", {"free_memory": True}).status == 200
    entry = server.finished(server.queue_prompt(prompt))
    cached = [node for kind, data in entry["status"]["messages"] if kind == "execution_cached" for node in data["nodes"]]
    assert cached == []
