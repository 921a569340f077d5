// The platform's own Node.js client, which never gives up: four loops that are out of step, two
// seconds a message, always more to do. The argument says how it calls: axios, fetch, or http.
const fs = require("node:fs");
const http = require("node:http");
const { setTimeout: sleep } = require("node:timers/promises");

const sidecar = process.env.SIDECAR_URL;
const facts = fs.openSync(process.env.FACTS, "a");
let number = 0;

const clients = {
  axios: (url) => require("axios").post(url),
  fetch: async (url) => (await fetch(url, { method: "POST" })).text(),
  http: (url) => new Promise((resolve, reject) => {
    const heard = (answer) => answer.resume().on("end", resolve);
    http.request(url, { method: "POST" }, heard).on("error", reject).end();
  }),
};
const post = clients[process.argv[2]];

async function tell(path) {
  try {
    await post(sidecar + path);
  } catch {
    // a sidecar that fails does not fail the work
  }
}

async function work() {
  for (;;) {
    const message = ++number;
    await tell("/start-request");
    fs.writeSync(facts, `begin ${message}\n`);
    await sleep(Math.min(message * 500, 2000));
    fs.writeSync(facts, `end ${message}\n`);
    await tell("/end-request");
  }
}

for (let n = 0; n < 4; n++) work();
