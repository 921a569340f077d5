"""The manifests: as kubectl builds them, against the schemas, and the alerts by promtool."""
import base64
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import unittest

from support import CACHE, HERE, Case, SidecarProcess, free_ports, host_of_its_own, needs, run

from echo_bot import read_concurrency

MANIFESTS = os.path.join(HERE, "manifests")
KUSTOMIZE = ["kubectl", "kustomize"] if shutil.which("kubectl") else [
    os.path.join(CACHE, "bin", "kustomize"), "build"]
MANIFESTS_BUILD = shutil.which(KUSTOMIZE[0]) and importlib.util.find_spec("yaml")
VALIDATE = MANIFESTS_BUILD and importlib.util.find_spec("kubernetes_validate")
TYPES = MANIFESTS_BUILD and os.path.exists(
    os.path.join(CACHE, "node_modules", "@kubernetes-models", "keda"))
# API groups and their npm packages.
OPERATORS = {"keda.sh": "keda", "monitoring.coreos.com": "prometheus-operator"}


def kustomize(folder="", components=()):
    """Return what `kubectl apply -k manifests/folder` would send after the README's `cp`.

    components: the overlays to switch on first, by uncommenting their lines.
    """
    def switch_on(text):
        for line in ["components:"] + ["  - overlays/" + component for component in components]:
            text = re.sub("^#(?=%s)" % line, "", text, flags=re.MULTILINE)
        return text
    return built(folder, switch_on if components else str)


def kustomize_in_order(components):
    """Return the same with the overlays in an order of their own."""
    lines = "".join("- overlays/%s\n" % component for component in components)
    return built("", lambda text: text + "components:\n" + lines)


def built(folder, change):
    """Return the objects of a folder of the manifests, with change(text) of kustomization.yaml."""
    import yaml
    with tempfile.TemporaryDirectory() as copy:
        copy = os.path.join(copy, "manifests")
        shutil.copytree(MANIFESTS, copy, ignore=shutil.ignore_patterns("bot.env"))
        shutil.copy(os.path.join(copy, "bot.env.example"), os.path.join(copy, "bot.env"))
        path = os.path.join(copy, "kustomization.yaml")
        with open(path) as file:
            text = file.read()
        with open(path, "w") as file:
            file.write(change(text))
        return list(yaml.safe_load_all(run(*KUSTOMIZE, os.path.join(copy, folder))))


def pick(objects, kind):
    """Return the one object of a kind."""
    found, = [thing for thing in objects if thing["kind"] == kind]
    return found


def containers(objects):
    """Return {name: container} of the Deployment, init containers and ordinary ones alike."""
    spec = pick(objects, "Deployment")["spec"]["template"]["spec"]
    return {container["name"]: container
            for container in spec.get("initContainers", []) + spec["containers"]}


def environment(container, objects):
    """Return the variables that a container gets, those of its ConfigMaps and Secrets too."""
    sources = {(thing["kind"], thing["metadata"]["name"]): thing for thing in objects}
    values = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            values.update(sources["ConfigMap", source["configMapRef"]["name"]]["data"])
        else:
            values.update((name, base64.b64decode(value).decode()) for name, value in
                          sources["Secret", source["secretRef"]["name"]]["data"].items())
    values.update((entry["name"], entry["value"] if "value" in entry else entry["valueFrom"])
                  for entry in container.get("env", []))
    return values


@needs("kubectl, or the Python package PyYAML", MANIFESTS_BUILD)
class TestManifests(Case):
    """What the manifests say, read from what kubectl builds of them."""

    OVERLAYS = ("pre-1.29", "kafka-sasl", "idle-first")

    def setUp(self):
        self.objects = kustomize()
        self.spec = pick(self.objects, "Deployment")["spec"]["template"]["spec"]
        self.sidecar, = self.spec["initContainers"]
        self.bot, = self.spec["containers"]

    def test_sidecar_is_native_and_starts_first(self):
        self.assertEqual(self.sidecar["restartPolicy"], "Always")
        self.assertEqual(self.sidecar["startupProbe"]["httpGet"]["path"], "/health")
        self.assertNotIn("replicas", pick(self.objects, "Deployment")["spec"],
                         "KEDA's, and would be reset by an apply")

    def test_preStop_hook_drains(self):
        self.assertEqual(self.bot["lifecycle"]["preStop"]["exec"]["command"],
                         ["python3", "/app/sidecar.py", "drain"])
        self.assertNotIn("lifecycle", self.sidecar)

    def test_grace_period_is_the_sum_in_the_comment(self):
        seconds = self.spec["terminationGracePeriodSeconds"]
        with open(os.path.join(MANIFESTS, "deployment.yaml")) as file:
            comment = re.search(r"# (\d+) s = (\d+) GRACE_PERIOD_SECONDS.*\n((?: +# +\+.*\n)+)",
                                file.read())
        parts = [int(comment.group(2))] + [int(part)
                                           for part in re.findall(r"\+ +(\d+)", comment.group(3))]
        self.assertEqual(seconds, int(comment.group(1)))
        self.assertEqual(seconds, sum(parts))
        self.assertEqual(str(parts[0]),
                         environment(self.sidecar, self.objects)["GRACE_PERIOD_SECONDS"])
        self.assertGreater(float(environment(self.sidecar, self.objects)["QUIET_PERIOD_SECONDS"]),
                           0)

    def test_ports_and_probes_are_the_sidecars(self):
        import sidecar
        ports = {port["name"]: port["containerPort"] for port in self.sidecar["ports"]}
        defaults = sidecar.Settings({})
        self.assertEqual(ports, {"http": defaults.port, "metrics": defaults.metrics_port})
        paths = {}
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            self.assertEqual(self.sidecar[name]["httpGet"]["port"], "http")
            paths[name] = self.sidecar[name]["httpGet"]["path"]
        self.assertEqual(paths, {"startupProbe": "/health", "readinessProbe": "/ready",
                                 "livenessProbe": "/health"})
        self.assertEqual(environment(self.bot, self.objects)["SIDECAR_URL"],
                         "http://127.0.0.1:%d" % defaults.port)

    def test_variables_are_known_to_the_programs(self):
        for objects in self.objects, kustomize(components=self.OVERLAYS):
            for name, program in ("sidecar", "sidecar.py"), ("bot", "echo_bot.py"):
                with open(os.path.join(HERE, program), encoding="utf-8") as file:
                    text = file.read()
                for variable in environment(containers(objects)[name], objects):
                    self.assertTrue(re.search(r"\b%s\b" % variable, text),
                                    "%s: unknown to %s" % (variable, program))

    def test_token_is_in_the_secret_only(self):
        secret = pick(self.objects, "Secret")
        self.assertEqual(list(secret["data"]), ["BOT_TOKEN"])
        self.assertNotIn("envFrom", self.sidecar)
        with open(os.path.join(HERE, ".gitignore")) as file:
            self.assertIn("manifests/bot.env", file.read().splitlines())

    def test_pod_security_standard_restricted(self):
        """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
        for components in (), self.OVERLAYS:
            objects = kustomize(components=components)
            spec = pick(objects, "Deployment")["spec"]["template"]["spec"]
            self.assertTrue(spec["securityContext"]["runAsNonRoot"])
            self.assertGreater(spec["securityContext"]["runAsUser"], 0)
            self.assertEqual(spec["securityContext"]["seccompProfile"], {"type": "RuntimeDefault"})
            self.assertFalse({"hostNetwork", "hostPID", "hostIPC"} & set(spec))
            for volume in spec.get("volumes", []):
                self.assertLessEqual(set(volume),
                                     {"name", "configMap", "secret", "emptyDir", "projected"})
            for container in containers(objects).values():
                self.assertEqual(container["securityContext"],
                                 {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                  "capabilities": {"drop": ["ALL"]}})
                self.assertFalse(
                    [port for port in container.get("ports", []) if "hostPort" in port])
                self.assertEqual(set(container["resources"]), {"requests", "limits"})
            self.assertIs(spec["automountServiceAccountToken"], False)
            self.assertIs(spec["enableServiceLinks"], False)

    def test_only_prometheus_comes_in(self):
        policy = pick(self.objects, "NetworkPolicy")["spec"]
        self.assertEqual(policy["policyTypes"], ["Ingress"])
        rule, = policy["ingress"]
        metrics, = [port["containerPort"] for port in self.sidecar["ports"]
                    if port["name"] == "metrics"]
        self.assertEqual(rule["ports"], [{"port": metrics, "protocol": "TCP"}])
        monitoring = {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}
        self.assertEqual(rule["from"], [{"namespaceSelector": monitoring}])

    def test_disruption_budget_never_blocks_a_drain(self):
        budget = pick(self.objects, "PodDisruptionBudget")["spec"]
        self.assertNotIn("minAvailable", budget)
        self.assertEqual(budget["maxUnavailable"], 1)
        self.assertEqual(budget["unhealthyPodEvictionPolicy"], "AlwaysAllow")

    def test_every_selector_finds_the_pods(self):
        template = pick(self.objects, "Deployment")["spec"]["template"]
        selectors = [pick(self.objects, kind)["spec"][name] for kind, name in (
            ("Deployment", "selector"), ("PodDisruptionBudget", "selector"),
            ("NetworkPolicy", "podSelector"))]
        selectors.append(pick(kustomize("monitoring"), "PodMonitor")["spec"]["selector"])
        for selector in selectors:
            self.assertLessEqual(set(selector["matchLabels"].items()),
                                 set(template["metadata"]["labels"].items()))

    def test_lag_alone_scales(self):
        scaled = pick(self.objects, "ScaledObject")["spec"]
        self.assertEqual(scaled["scaleTargetRef"]["name"],
                         pick(self.objects, "Deployment")["metadata"]["name"])
        self.assertEqual((scaled["minReplicaCount"], scaled["maxReplicaCount"]), (0, 5))
        trigger, = scaled["triggers"]
        settings = trigger["metadata"]
        self.assertEqual((trigger["type"], settings["offsetResetPolicy"]), ("kafka", "earliest"))
        # What a pod has in hand is lag as well, and nobody waits for it.
        self.assertEqual(int(settings["lagThreshold"]), 2 * read_concurrency({}))
        source = containers(self.objects)[scaled["scaleTargetRef"]["envSourceContainerName"]]
        variables = environment(source, self.objects)
        for name, variable in settings.items():
            if name.endswith("FromEnv"):
                self.assertIn(variable, variables)

    def test_every_pod_shares_its_process_namespace(self):
        """The sidecar holds starts, and goes last, only where it does."""
        for components in ([], *([name] for name in self.OVERLAYS), self.OVERLAYS):
            pod = pick(kustomize(components=components), "Deployment")["spec"]["template"]["spec"]
            self.assertIs(pod["shareProcessNamespace"], True, components)

    def test_before_1_29_the_sidecar_is_an_ordinary_container(self):
        objects = kustomize(components=["pre-1.29"])
        spec = pick(objects, "Deployment")["spec"]["template"]["spec"]
        self.assertNotIn("initContainers", spec)
        sidecar, bot = spec["containers"]
        self.assertEqual(bot, dict(self.bot, envFrom=bot["envFrom"]))
        expected = dict(self.sidecar)
        del expected["restartPolicy"]
        hook = sidecar.pop("lifecycle")
        self.assertEqual(sidecar, expected)
        self.assertEqual(list(hook), ["postStart"])     # a preStop hook would change nothing

    def test_before_1_29_the_bot_is_started_when_the_sidecar_listens(self):
        sidecar = containers(kustomize(components=["pre-1.29"]))["sidecar"]
        command = sidecar["lifecycle"]["postStart"]["exec"]["command"]
        self.assertEqual(command[:2], ["python3", "-c"])
        host = host_of_its_own()
        port, = free_ports(host, 1)
        script = command[2].replace("127.0.0.1:8081/", "%s:%d/" % (host, port))
        self.assertIn(host, script)
        hook = self.program(sys.executable, "-c", "print('up', flush=True)\n" + script)
        hook.wait_for("up")
        self.assertIsNone(hook.process.poll())
        running = SidecarProcess(SIDECAR_HOST=host, SIDECAR_PORT=port)
        self.addCleanup(running.kill)
        self.assertEqual(hook.wait(), 0)

    def test_with_sasl_KEDA_logs_in_as_the_bot_does(self):
        objects = kustomize(components=["kafka-sasl"])
        login = pick(objects, "TriggerAuthentication")
        trigger, = pick(objects, "ScaledObject")["spec"]["triggers"]
        variables = environment(containers(objects)["bot"], objects)
        self.assertEqual(trigger["authenticationRef"]["name"], login["metadata"]["name"])
        self.assertEqual(trigger["metadata"]["tls"], "enable")
        self.assertEqual(trigger["metadata"]["sasl"].replace("_", "").upper(),
                         variables["KAFKA_SASL_MECHANISM"].replace("-", ""))
        volume, = self.spec["volumes"]
        mount, = containers(objects)["bot"]["volumeMounts"]
        ca, = login["spec"]["secretTargetRef"]
        self.assertEqual(
            (volume["secret"]["secretName"], os.path.join(mount["mountPath"], ca["key"])),
            (ca["name"], variables["KAFKA_SSL_CAFILE"]))


    def test_idle_first_is_the_sidecars_alone(self):
        """It gets the account's token, and the bot, which has more to lose, does not."""
        for components in ["idle-first"], ["pre-1.29", "idle-first"]:
            objects = kustomize(components=components)
            spec = pick(objects, "Deployment")["spec"]["template"]["spec"]
            account = pick(objects, "ServiceAccount")
            self.assertEqual(spec["serviceAccountName"], account["metadata"]["name"])
            self.assertIs(account["automountServiceAccountToken"], False)
            self.assertEqual([name for name, container in containers(objects).items()
                              if "account" in [mount["name"] for mount in
                                               container.get("volumeMounts", [])]], ["sidecar"])
            variables = environment(containers(objects)["sidecar"], objects)
            self.assertEqual(variables["POD_DELETION_COST"], "true")
            self.assertEqual(variables["POD_NAME"], {"fieldRef": {"fieldPath": "metadata.name"}})
            self.assertNotIn("POD_NAME", environment(containers(objects)["bot"], objects))

    def test_idle_first_mounts_what_the_sidecar_reads(self):
        import sidecar
        objects = kustomize(components=["idle-first"])
        spec = pick(objects, "Deployment")["spec"]["template"]["spec"]
        mount, = containers(objects)["sidecar"]["volumeMounts"]
        self.assertEqual(mount["mountPath"] + "/", sidecar.ACCOUNT_FOLDER)
        volume, = [volume for volume in spec["volumes"] if volume["name"] == mount["name"]]
        paths = []
        for source in volume["projected"]["sources"]:
            (_, content), = source.items()
            paths += [item["path"] for item in content.get("items", [content])]
        self.assertEqual(sorted(paths), ["ca.crt", "namespace", "token"])

    def test_idle_first_has_one_right(self):
        objects = kustomize(components=["idle-first"])
        account, binding = pick(objects, "ServiceAccount"), pick(objects, "RoleBinding")
        self.assertEqual(pick(objects, "Role")["rules"],
                         [{"apiGroups": [""], "resources": ["pods"], "verbs": ["patch"]}])
        subject, = binding["subjects"]
        self.assertEqual(subject, {"kind": "ServiceAccount", "name": account["metadata"]["name"],
                                   "namespace": account["metadata"]["namespace"]})
        self.assertEqual(binding["roleRef"]["name"], pick(objects, "Role")["metadata"]["name"])
        policy = pick(objects, "ValidatingAdmissionPolicy")
        bound = pick(objects, "ValidatingAdmissionPolicyBinding")["spec"]
        self.assertEqual(bound, {"policyName": policy["metadata"]["name"],
                                 "validationActions": ["Deny"]})
        condition, = policy["spec"]["matchConditions"]
        self.assertIn('":%s"' % account["metadata"]["name"], condition["expression"])

    def test_overlays_in_any_order(self):
        builds = [kustomize_in_order(order) for order in itertools.permutations(self.OVERLAYS)]
        self.assertEqual([container["name"] for container in pick(builds[0], "Deployment")["spec"]
                          ["template"]["spec"]["containers"]], ["sidecar", "bot"])
        for objects in builds[1:]:
            self.assertEqual(objects, builds[0])


@needs("kubectl, or the Python package kubernetes-validate", VALIDATE)
class TestKubernetesSchemas(Case):
    """The API server's published schemas, with unknown fields refused."""

    VERSIONS = {(): ("1.29", "newest"), ("kafka-sasl",): ("1.29", "newest"),
                ("idle-first",): ("1.30", "newest"),
                ("pre-1.29",): ("1.26", "1.27", "1.28", "1.29", "newest")}

    def test_every_object(self):
        for components, versions in self.VERSIONS.items():
            for thing in kustomize(components=components) + kustomize("monitoring"):
                for version in versions:
                    self.validate(thing, version)

    def test_wrong_objects_are_refused(self):
        import kubernetes_validate
        for path, value in ((("spec", "template", "spec", "terminationGracePeriodSeconds"), "45s"),
                            (("spec", "template", "spec", "terminationGracePeriod"), 45),
                            (("spec", "replcas"), 1)):
            deployment = pick(kustomize(), "Deployment")
            parent = deployment
            for name in path[:-1]:
                parent = parent[name]
            parent[path[-1]] = value
            for version in "1.29", "newest":
                with self.assertRaises(kubernetes_validate.ValidationError, msg=path):
                    self.validate(deployment, version)

    def validate(self, thing, version):
        import kubernetes_validate
        if thing["apiVersion"].partition("/")[0] in OPERATORS:
            return
        version = kubernetes_validate.latest_version() if version == "newest" else version
        kubernetes_validate.validate(thing, version, strict=True)


@needs("kubectl, Node.js, or the npm packages @kubernetes-models and typescript", TYPES)
class TestOperatorTypes(Case):
    """KEDA's and the Prometheus operator's published types.

    TypeScript refuses unknown fields, and validate() the rest.
    """

    def test_every_object(self):
        objects = kustomize(components=["kafka-sasl", "idle-first"]) + kustomize("monitoring")
        kinds = [thing["kind"] for thing in objects if self.check(thing)]
        self.assertEqual(sorted(kinds),
                         ["PodMonitor", "PrometheusRule", "ScaledObject", "TriggerAuthentication"])

    def test_wrong_objects_are_refused(self):
        def scaled_object(change):
            thing = pick(kustomize(), "ScaledObject")
            change(thing["spec"])
            return thing

        for thing in (scaled_object(lambda spec: spec.update(minReplicas=0)),
                      scaled_object(lambda spec: spec.update(minReplicaCount="0")),
                      scaled_object(
                          lambda spec: spec["triggers"][0]["metadata"].update(lagThreshold=5)),
                      scaled_object(
                          lambda spec: spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
                          ["scaleDown"].update(stabilisationWindowSeconds=1))):
            with self.assertRaises(AssertionError):
                self.check(thing)
        rule = pick(kustomize("monitoring"), "PrometheusRule")
        rule["spec"]["groups"][0]["interval"] = "5 s"
        with self.assertRaises(AssertionError):
            self.check(rule)

    def check(self, thing):
        """Return whether the object is of an operator's kind.

        AssertionError: the operator would refuse it.
        """
        group, _, version = thing["apiVersion"].partition("/")
        if group not in OPERATORS:
            return False
        kind = thing["kind"]
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:        # Where node_modules is found.
            path = os.path.join(folder, "thing.mts")
            with open(path, "w") as file:
                file.write("import { %s, I%s } from '@kubernetes-models/%s/%s/%s/%s';\n"
                           % (kind, kind, OPERATORS[group], group, version, kind)
                           + "const thing: I%s = %s;\nnew %s(thing).validate();\n"
                           % (kind, json.dumps(thing), kind))
            run("node", os.path.join(CACHE, "node_modules", "typescript", "bin", "tsc"), "--strict",
                "--skipLibCheck", "--noEmitOnError", "--target", "es2022", "--module", "nodenext",
                path)
            run("node", os.path.join(folder, "thing.mjs"))
        return True


PROMTOOL = MANIFESTS_BUILD and shutil.which("promtool")


@needs("promtool", PROMTOOL)
class TestAlerts(Case):
    """Each alert, evaluated by promtool over a made-up past of one pod.

    It is quiet at some moments, and fires at others.
    """

    LABELS = 'namespace="telegram-serverless", pod="bot-echo-1"'
    SCRAPE = 5          # Seconds between two samples, as the PodMonitor says.

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.rules = pick(kustomize("monitoring"), "PrometheusRule")["spec"]
        self.write("rules.json", {"groups": self.rules["groups"]})

    def write(self, name, thing):
        with open(os.path.join(self.folder, name), "w") as file:        # JSON is YAML.
            json.dump(thing, file)
        return file.name

    def check(self, alert, series, quiet=(), firing=()):
        """`series` is {metric: promtool's notation of its samples}.

        `quiet` and `firing` are the seconds at which to look.
        """
        def samples(at):
            return {"expr": 'count(ALERTS{alertname="%s", alertstate="firing"}) or vector(0)'
                    % alert, "eval_time": "%ds" % at,
                    "exp_samples": [{"labels": "{}", "value": int(at in firing)}]}
        self.assertIn(alert,
                      [rule["alert"] for group in self.rules["groups"] for rule in group["rules"]])
        run("promtool", "test", "rules", self.write("test.json", {
            "rule_files": ["rules.json"], "evaluation_interval": "%ds" % self.SCRAPE, "tests": [{
                "interval": "%ds" % self.SCRAPE,
                "input_series": [{"series": name[:-1] + ", " * (name[-2] != "{") + self.LABELS
                                  + "}", "values": values}
                                 for name, values in series.items()],
                "promql_expr_test": [samples(at) for at in sorted(set(quiet) | set(firing))]}]}))

    def test_stuck_request(self):
        grace = {"sidecar_grace_period_seconds{}": "30x60"}
        self.check("SidecarRequestStuck",
                   dict(grace, **{"sidecar_oldest_request_age_seconds{}": "0+5x60"}),
                   quiet=[30, 80], firing=[120, 300])
        self.check("SidecarRequestStuck",
                   dict(grace, **{"sidecar_oldest_request_age_seconds{}": "0+5x5 0+5x5 0x48"}),
                   quiet=[60, 120, 300])

    def drain(self, grace, elapsed, active, **outcomes):
        """Return the series of a pod whose drain begins at 60 s."""
        series = {"sidecar_grace_period_seconds{}": "%dx400" % grace,
                  "sidecar_drain_elapsed_seconds{}": "0x11 " + elapsed,
                  "sidecar_active_requests{}": active}
        return dict(series, **{'sidecar_drains_total{outcome="%s"}' % name: values
                               for name, values in outcomes.items()})

    def test_drain_that_ran_out_before_the_pod_was_gone(self):
        """It fires from 0.8 of the grace period on, and goes on after the pod is gone."""
        self.check("SidecarDrainTimedOut",
                   self.drain(30, "0+5x5 stale", "1x17 stale", timed_out="0x17 stale"),
                   quiet=[60, 80, 1200], firing=[85, 300, 900])
        self.check("SidecarDrainTimedOut",
                   self.drain(300, "0+5x59 stale", "1x71 stale", timed_out="0x71 stale"),
                   quiet=[90, 300], firing=[310, 360])

    def test_drain_that_ran_out_and_was_counted(self):
        self.check("SidecarDrainTimedOut",
                   {'sidecar_drains_total{outcome="timed_out"}': "0x11 1x100",
                    'sidecar_drains_total{outcome="completed"}': "0x111"}, quiet=[55, 1200],
                   firing=[60, 300])

    def test_drains_that_completed(self):
        self.check("SidecarDrainTimedOut", self.drain(30, "0+5x3 stale", "1x15 stale"),
                   quiet=[60, 75, 300])
        self.check("SidecarDrainTimedOut",
                   self.drain(30, "0 5 10x60", "2x13 0x58", completed="0x13 1x58"),
                   quiet=[60, 90, 300])

    def test_a_long_drain_of_a_long_grace_period_that_completed(self):
        self.check("SidecarDrainTimedOut",
                   self.drain(300, "0+5x7 35x60", "2x18 0x58", completed="0x18 1x58"),
                   quiet=[60, 85, 95, 300])

    def test_unmatched_ends(self):
        self.check("SidecarUnmatchedEnds", {"sidecar_unmatched_ends_total{}": "0x10 1x110"},
                   quiet=[100, 300])
        self.check("SidecarUnmatchedEnds", {"sidecar_unmatched_ends_total{}": "0x10 0+1x10 10x250"},
                   quiet=[50, 1300], firing=[100, 300])

    def test_refused_calls_and_connections(self):
        for name in "calls", "connections":
            self.check("SidecarRefuses", {"sidecar_%s_refused_total{}" % name: "0x10 1x250"},
                       quiet=[50, 700], firing=[60, 300])

    def test_absent_sidecar(self):
        running = 'kube_pod_status_phase{phase="Running", instance="10.0.0.1:8080"}'
        up = 'up{instance="10.0.0.2:9091"}'
        self.check("SidecarAbsent", {running: "1x60", up: "1x60"}, quiet=[60, 300])
        self.check("SidecarAbsent", {running: "1x60", up: "1x12 0x48"}, quiet=[60, 175],
                   firing=[195, 300])
        self.check("SidecarAbsent", {running: "1x60"}, quiet=[60], firing=[125, 300])
        self.check("SidecarAbsent", {running: "0x60"}, quiet=[300])
        self.check("SidecarAbsent", {up: "0x60"}, quiet=[300])

    def test_every_alert_has_a_case_here(self):
        with open(os.path.abspath(__file__), encoding="utf-8") as file:
            tested = set(re.findall(r'self\.check\("(\w+)"', file.read()))
        self.assertLessEqual(
            {rule["alert"] for group in self.rules["groups"] for rule in group["rules"]}, tested)

    def test_every_query_is_valid_and_asks_for_metrics_that_the_sidecar_has(self):
        dashboard = json.loads(pick(kustomize("monitoring"), "ConfigMap")["data"]["dashboard.json"])
        queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
        self.write("queries.json", {"groups": [{"name": "dashboard", "rules": [
            {"record": "query:%d" % number, "expr": query}
            for number, query in enumerate(queries)]}]})
        for name in "queries.json", "rules.json":
            run("promtool", "check", "rules", os.path.join(self.folder, name))
        exposed = set(re.findall(r"^(\w+)", self.sidecar().prometheus(), re.MULTILINE))
        alerts = [rule["expr"] for group in self.rules["groups"] for rule in group["rules"]]
        self.assertLessEqual(set(re.findall(r"\bsidecar_\w+", " ".join(queries + alerts))), exposed)
        self.assertEqual(len({panel["id"] for panel in dashboard["panels"]}),
                         len(dashboard["panels"]))


if __name__ == "__main__":
    unittest.main(verbosity=2)
