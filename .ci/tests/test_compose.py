"""README's compose file, run by Docker's own Compose on the engine that podman stands in for."""
import os
import re
import shutil
import subprocess
import tempfile
import unittest

from support import CACHE, HERE, PATIENCE, Case, needs, readme_blocks, run, until, version_of
from test_image import BASE, PODMAN, WORKER

COMPOSE = os.path.join(CACHE, "docker-compose")
DOCKERFILE = """
FROM %s
COPY sh /bin/sh
COPY sidecar.py worker.py /app/
ENTRYPOINT ["python3", "/app/worker.py"]
""" % BASE
# Podman looks for an init of its own elsewhere, and without the delay it would show a command that
# has ended as running for five minutes.
CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
init_path = "%s"
exit_command_delay = 0
""" % shutil.which("tini")


@needs("Compose 2.30, podman, tini, or the image %s," % BASE,
       version_of([COMPOSE, "version"]) >= (2, 30) and PODMAN and shutil.which("tini"))
class TestCompose(Case):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.images = {name: "localhost/%s:test-%d" % (name, os.getpid())
                      for name in ("sidecar", "worker")}
        for name, content in (("worker.py", WORKER), ("Dockerfile", DOCKERFILE),
                              ("containers.conf", CONTAINERS_CONF)):
            with open(os.path.join(cls.folder, name), "w") as file:
                file.write(content)
        shutil.copy(os.path.join(HERE, "sidecar.py"), cls.folder)
        shutil.copy(os.path.realpath("/bin/sh"), os.path.join(cls.folder, "sh"))
        run("podman", "build", "--pull=never", "--format", "docker", "--target", "sidecar",
            "--tag", cls.images["sidecar"], HERE)
        run("podman", "build", "--pull=never", "--tag", cls.images["worker"], cls.folder)
        cls.addClassCleanup(run, "podman", "rmi", "--force", *cls.images.values())

    def setUp(self):
        """Start podman's engine, which speaks Docker's protocol."""
        engine = "unix://%s/%s.sock" % (self.folder, self._testMethodName)
        self.env = dict(os.environ, DOCKER_HOST=engine,
                        CONTAINERS_CONF=os.path.join(self.folder, "containers.conf"))
        self.engine = self.program("podman", "system", "service", "--time", 0, engine,
                                   env=self.env)
        until(lambda: os.path.exists(engine.partition("://")[2]))
        self.project = "test-%d-%s" % (os.getpid(), self._testMethodName.replace("_", "-"))

    def compose(self, *arguments):
        return run(COMPOSE, "--project-name", self.project, "--file",
                   os.path.join(self.folder, "compose.yaml"), *arguments, env=self.env,
                   timeout=4 * PATIENCE)

    def up(self, seconds, **settings):
        """Start README's services, with a worker whose requests take so many seconds."""
        text, = [block for block in readme_blocks("yaml") if block.startswith("services:")]
        for name, image in self.images.items():
            text = re.sub(r"image: %s:[\d.]+" % name, "image: " + image, text)
        for name, value in settings.items():
            text = text.replace("HOLD_STARTS:", "%s: %s\n      HOLD_STARTS:" % (name, value))
        text = text.replace("init: true", "init: true\n    environment: {SECONDS: %s}" % seconds)
        with open(os.path.join(self.folder, "compose.yaml"), "w") as file:
            file.write(text)
        self.addCleanup(run, "podman", "network", "rm", "--force", self.project + "_default")
        for service in "sidecar", "worker":             # The last that is added goes first.
            self.addCleanup(run, "podman", "rm", "--force", "--ignore", "--time", 0,
                            self.container(service))
        self.compose(*self.lines()[0])
        # Not before: the worker may have been there first.
        until(lambda: '"active_requests": 1' in run(
            "podman", "exec", self.container("sidecar"), "python3", "/app/sidecar.py", "metrics"))

    def lines(self):
        """Return what README says after `docker compose`, in its order."""
        return [line.split() for line in re.findall(
            r"^docker compose (.*)$", "\n".join(readme_blocks("sh")), re.MULTILINE)]

    def container(self, service):
        return "%s-%s-1" % (self.project, service)

    def logs(self, service):
        return run("podman", "logs", self.container(service), stderr=subprocess.STDOUT)

    def status(self, service):
        return run("podman", "inspect", "--format", "{{.State.ExitCode}}",
                   self.container(service)).strip()

    def stop(self):
        # Without a time-out podman's engine lets a container no time at all, where Docker's gives
        # it ten seconds.
        self.compose(*self.lines()[1], "--timeout", PATIENCE)

    def test_stop_cuts_nothing_off(self):
        self.up(1)
        self.stop()
        worker, sidecar = self.logs("worker"), self.logs("sidecar")
        self.assertEqual(re.findall("took (.*)", worker), re.findall("did (.*)", worker))
        self.assertRegex(sidecar, r"(?s)drain started.*drain completed.*signal signal=SIGTERM")
        self.assertEqual((self.status("worker"), self.status("sidecar")), ("143", "0"))

    def test_stop_when_the_grace_period_is_over(self):
        self.up(10 * PATIENCE, GRACE_PERIOD_SECONDS=1)
        self.stop()
        self.assertRegex(self.logs("sidecar"), "(?s)drain started.*drain timed out.*signal signal")
        self.assertEqual((self.status("worker"), self.status("sidecar")), ("143", "1"))


if __name__ == "__main__":
    unittest.main(verbosity=2)
