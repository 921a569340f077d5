"""The README's clients in Go and Node.js do what the one in Python does."""
import os
import re
import subprocess
import unittest

from support import Case, Clients, needs, readme_blocks, version_of


def patient(client):
    """Return README's client with two seconds for a call, where it has half of one: a machine that
    is busy is no sidecar that hangs."""
    text, count = re.subn(r"([Tt]imeout: )500\b", r"\g<1>2000", client)
    if count != 1:
        raise AssertionError("README's client gives a call another time")
    return text


GO_WORKER = """package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

var lines = make(chan string)

func read() {
	for input := bufio.NewScanner(os.Stdin); input.Scan(); {
		lines <- input.Text()
	}
	close(lines)
}

func nextMessage(term context.Context) (string, bool) {
	select {
	case line, open := <-lines:
		if !open {
			os.Exit(0)
		}
		return line, true
	case <-term.Done():
		return "", false
	}
}

func handle(message string) error {
	fmt.Println("took", message)
	if strings.HasPrefix(message, "hold") {
		<-lines
	} else {
		time.Sleep(60 * time.Millisecond)
	}
	switch {
	case strings.HasPrefix(message, "throw"):
		panic("cannot " + message)
	case strings.HasPrefix(message, "fail"):
		return errors.New("cannot " + message)
	}
	fmt.Println("did", message)
	return nil
}

func main() {
	go read()
"""


@needs("Go 1.19", version_of(["go", "version"]) >= (1, 19))
class TestGoClient(Clients, Case):
    @classmethod
    def build(cls):
        client, loop = readme_blocks("go")
        cls.write("go.mod", "module worker\n\ngo 1.19\n")
        cls.write("sidecar.go", patient(client))
        cls.write("main.go", GO_WORKER + loop + "}\n")
        for command in (["go", "vet", "."], ["go", "build", "-o", "worker", "."]):
            env = dict(os.environ, GOFLAGS="-mod=mod", GOTOOLCHAIN="local", GOWORK="off")
            done = subprocess.run(command, cwd=cls.folder, env=env, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT)
            if done.returncode:
                raise AssertionError("%s: %s" % (command, done.stdout.decode()))
        return os.path.join(cls.folder, "worker"),

    def test_a_returned_error_is_handed_on_and_the_loop_goes_on(self):
        sidecar = self.sidecar()
        worker = self.worker(sidecar.url)
        self.tell(worker, "fail early", "work b")
        self.assertEqual(self.finish(worker), 0, worker.log)
        self.assertIn("cannot fail early", worker.log)
        self.assertIn("did work b", worker.log)
        self.assertEqual(sidecar.sample("sidecar_request_duration_seconds_count"), 2)


@needs("Node.js 18", version_of(["node", "--version"]) >= (18, 0))
class TestNodeClient(Clients, Case):
    @classmethod
    def build(cls):
        client, loop = readme_blocks("js")
        cls.write("sidecar.mjs", patient(client))
        return "node", cls.write("worker.mjs", """
import { createInterface } from "node:readline";

const input = createInterface({ input: process.stdin });
const lines = input[Symbol.asyncIterator]();
const terminated = new Promise((resolve) => process.once("SIGTERM", () => resolve({})));

async function nextMessage() {
  const { value, done } = await Promise.race([lines.next(), terminated]);
  if (done) process.exit(0);
  return value;
}

async function handle(message) {
  console.log("took", message);
  if (message.startsWith("hold")) await lines.next();
  else await new Promise((resolve) => setTimeout(resolve, 60));
  if (message.startsWith("throw")) throw new Error("cannot " + message);
  console.log("did", message);
}

""" + loop + "input.close();\n")


if __name__ == "__main__":
    unittest.main(verbosity=2)
