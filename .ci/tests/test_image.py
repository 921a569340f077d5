"""Both images, built and run by podman."""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

from support import HERE, PATIENCE, Case, needs, readme_blocks, run, text_of, until

BASE = "gcr.io/distroless/python3-debian12:nonroot"
PODMAN = shutil.which("podman") and not subprocess.call(["podman", "image", "exists", BASE])

# A worker for a container, whose sidecar.py is in /app. It knows nothing of a drain: no handler for
# SIGTERM, and each start may wait without end.
WORKER = """#!/usr/bin/python3
import itertools, os, sys, time
sys.path.insert(0, "/app")
from sidecar import Sidecar

sidecar = Sidecar()
sidecar.reset()
for number in itertools.count():
    with sidecar.track():
        print("took", number, flush=True)
        time.sleep(float(os.environ.get("SECONDS", 1)))
        print("did", number, flush=True)
"""


@needs("podman, or the image %s," % BASE, PODMAN)
class TestImage(Case):
    """Both images, built by podman and run locked down.

    The base is the real one, or what .ci/run puts in its place.
    """

    # Podman's own may be forbidden.
    LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")
    LOCKED_DOWN = ("--read-only", "--cap-drop", "ALL") + LIMITS

    @classmethod
    def setUpClass(cls):
        cls.images = {}
        for target in "sidecar", "echo-bot":
            cls.images[target] = "localhost/%s:test-%d" % (target, os.getpid())
            # Docker's format, because OCI's has no HEALTHCHECK.
            run("podman", "build", "--pull=never", "--format", "docker", "--target", target,
                "--tag", cls.images[target], HERE)
        cls.names = 0

    @classmethod
    def tearDownClass(cls):
        run("podman", "rmi", "--force", *cls.images.values())

    def container(self, *arguments, image="sidecar", network="none", **env):
        """Start a container, locked down, and return its name.

        `network` says whose network it shares, as in a pod.
        """
        TestImage.names += 1
        name = "test-%d-%d" % (os.getpid(), self.names)
        self.addCleanup(run, "podman", "rm", "--force", "--ignore", "--time", 0, name)
        run("podman", "run", "--detach", "--name", name, "--network", network, *self.LOCKED_DOWN,
            *["--env=%s=%s" % pair for pair in env.items()], self.images[image], *arguments)
        return name

    def sidecar_container(self, *arguments, **env):
        name = self.container(*arguments, **env)
        until(lambda: "listening" in self.logs(name))
        return name

    def worker_of(self, name):
        """Start the worker of a container's pod, which shares its network; return its name."""
        return self.container("-c", "import time; time.sleep(%d)" % PATIENCE, image="echo-bot",
                              network="container:" + name)

    def ask(self, name, command):
        """Run `sidecar.py command` in a container, as an exec hook does; return what it printed."""
        return run("podman", "exec", name, "python3", "/app/sidecar.py", command)

    def post(self, name, path):
        """Call the API from within a container."""
        run("podman", "exec", name, "python3", "-c", "import urllib.request as u; "
            "u.urlopen(u.Request('http://127.0.0.1:8081%s', method='POST'))" % path)

    def logs(self, name):
        return run("podman", "logs", name, stderr=subprocess.STDOUT)

    def inspect(self, thing, what):
        return json.loads(run("podman", "inspect", "--format", "{{json %s}}" % what, thing))

    def test_layers_are_the_copied_files(self):
        base = self.inspect(BASE, ".RootFS.Layers")
        for target, files in (("sidecar", ["sidecar.py"]),
                              ("echo-bot", ["echo_bot.py", "sidecar.py"])):
            layers = self.inspect(self.images[target], ".RootFS.Layers")
            self.assertEqual(layers[:len(base)], base)
            self.assertEqual(len(layers) - len(base), len(files))
            listing = ("import os; os.chdir('/app')\n"
                       "for name in sorted(os.listdir()): print(name, oct(os.stat(name).st_mode))")
            listed = run("podman", "run", "--rm", "--network", "none", *self.LOCKED_DOWN,
                         "--entrypoint", "python3", self.images[target], "-c", listing)
            self.assertEqual(listed.splitlines(), [name + " 0o100444" for name in files])

    def test_labels(self):
        version = run(sys.executable, os.path.join(HERE, "sidecar.py"), "--version").split()[1]
        for target, image in self.images.items():
            labels = self.inspect(image, ".Config.Labels")
            prefix = "org.opencontainers.image."
            self.assertEqual(labels[prefix + "title"], target)
            self.assertEqual(labels[prefix + "version"], version)
            self.assertEqual(labels[prefix + "base.name"], BASE)
            self.assertTrue(labels[prefix + "description"])

    def test_runs_as_nobody_with_nothing_allowed(self):
        status = run("podman", "exec", self.sidecar_container(), "python3", "-c",
                     "print(open('/proc/1/cmdline').read().replace('\\0', ' '))\n"
                     "print(*(line for line in open('/proc/1/status') if line[:3] in ('Uid', "
                     "'Gid', 'Cap')))\n"
                     "for path in '/app/x', '/home/nonroot/x', '/etc/x':\n"
                     "    try: open(path, 'w')\n"
                     "    except OSError as error: print(error.strerror)")
        self.assertEqual(status.splitlines()[0].strip(), "python3 /app/sidecar.py")
        self.assertEqual([line.split()[1] for line in status.splitlines() if ":\t" in line],
                         ["65532"] * 2 + ["0" * 16] * 5)
        self.assertEqual(status.count("Read-only file system"), 3)

    def test_health_status(self):
        name = self.sidecar_container()
        self.assertEqual(self.inspect(self.images["sidecar"], ".HealthCheck")["Test"],
                         ["CMD", "python3", "/app/sidecar.py", "health"])
        run("podman", "healthcheck", "run", name)
        self.assertEqual(self.inspect(name, ".State.Health.Status"), "healthy")
        broken = self.sidecar_container(SIDECAR_URL="http://127.0.0.1:1")
        with self.assertRaises(AssertionError):
            run("podman", "healthcheck", "run", broken)

    def test_stop_waits_for_the_open_request(self):
        name = self.sidecar_container()
        worker = self.worker_of(name)
        self.post(worker, "/start-request")
        stop = self.program("podman", "stop", "--time", PATIENCE, name)
        until(lambda: "drain started" in self.logs(name))
        with self.assertRaises(AssertionError):
            self.ask(worker, "ready")
        self.assertIn('"active_requests": 1', self.ask(worker, "metrics"))
        self.assertIsNone(stop.process.poll())
        self.post(worker, "/end-request")
        self.assertEqual(stop.wait(), 0)
        self.assertEqual(self.inspect(name, ".State.ExitCode"), 0)

    def test_stop_past_the_grace_period(self):
        name = self.sidecar_container(GRACE_PERIOD_SECONDS=1)
        self.post(name, "/start-request")
        run("podman", "stop", "--time", PATIENCE, name)
        self.assertEqual(self.inspect(name, ".State.ExitCode"), 1)
        self.assertIn("still active", self.logs(name))

    def test_echo_bot_image_runs_both(self):
        echo = run("podman", "run", "--rm", "--interactive", "--network", "none", *self.LOCKED_DOWN,
                   self.images["echo-bot"], stdin=None, input=b"hello\n")
        self.assertIn("Echo: hello", echo)
        name = self.sidecar_container("/app/sidecar.py", image="echo-bot")
        run("podman", "stop", "--time", PATIENCE, name)
        self.assertEqual(self.inspect(name, ".State.ExitCode"), 0)

    def built(self, name, folder, dockerfile):
        """Build an image of the files in a folder, which goes with the test; return its name."""
        with open(os.path.join(folder, "Dockerfile"), "w") as file:
            file.write(dockerfile)
        self.images[name] = "localhost/%s:test-%d" % (name, os.getpid())
        self.addCleanup(lambda: run("podman", "rmi", "--force", self.images.pop(name)))
        run("podman", "build", "--pull=never", "--format", "docker", "--tag", self.images[name],
            folder)
        return self.images[name]

    def test_readmes_dockerfiles(self):
        """What each makes drains before its worker is stopped. The system's own Python is there."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        with open(os.path.join(folder.name, "worker"), "w") as file:
            file.write(WORKER)
        os.chmod(file.name, 0o755)
        shutil.copy(os.path.join(HERE, "sidecar.py"), folder.name)
        worker = self.built("worker", folder.name, "FROM %s\nCOPY worker /worker\n" % BASE)
        for number, text in enumerate(readme_blocks("dockerfile")):
            text = text.replace("worker:1.0.0", worker)
            text = re.sub(r"\bsidecar:[\d.]+", self.images["sidecar"], text)
            text = re.sub("^RUN .*install.* python3 .*\n", "", text, flags=re.MULTILINE)
            self.assertNotIn("RUN", text)
            with self.subTest(dockerfile=text):
                self.built("of-readme-%d" % number, folder.name, text)
                name = self.container(image="of-readme-%d" % number)
                until(lambda: "took 1" in self.logs(name))
                run("podman", "stop", "--time", PATIENCE, name)
                log = self.logs(name)
                self.assertEqual(re.findall("took (.*)", log), re.findall("did (.*)", log))
                self.assertIn("drain completed", log)
                self.assertEqual(self.inspect(name, ".State.ExitCode"), 143)
        self.assertEqual(number, 1)

    def test_readmes_docker_lines(self):
        """Each of them, in their order, with podman for docker and names of the test's own."""
        lines = re.findall(r"^docker ((?:run|exec|stop) .*)$", text_of("README.md"), re.MULTILINE)
        self.assertEqual([line.split()[0] for line in lines], ["run", "run", "exec", "stop", "run"])
        name = "test-%d-readme" % os.getpid()
        self.addCleanup(run, "podman", "rm", "--force", "--ignore", "--time", 0, name)
        for line in lines:
            line = re.sub(r"(?<=[ :])sidecar(?= |$)", name, line).replace("-it", "--interactive")
            line = re.sub(r"\b(sidecar|echo-bot):[0-9.]+",
                          lambda match: self.images[match.group(1)], line)
            if line.startswith("run"):
                network = () if "--network" in line else ("--network", "none")
                line = " ".join(("run",) + network + self.LIMITS) + line[len("run"):]
            output = run("podman", *line.split(), stdin=None, input=b"hello\n")
            if " -d " in line:
                until(lambda: "listening" in self.logs(name))
            if "/echo-bot:" in line:
                self.assertIn("Echo: hello", output)
            elif line.endswith("metrics"):
                self.assertIn('"total_requests": 1,', output)


if __name__ == "__main__":
    unittest.main(verbosity=2)
