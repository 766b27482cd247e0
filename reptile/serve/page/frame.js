/** What both pages share: the server's token, errors, and where learning runs. */

import { InputError } from "./client/bundle.js";
import { ServiceError } from "./client/service.js";

const ROOT = new URL("..", import.meta.url);
const RUNTIME = new URL("ort/ort.wasm.bundle.min.mjs", ROOT);
const headers = {};
const models = {}; // by where they run; a promise each

export const $ = (id) => document.getElementById(id);

/** Fetch the bundle's manifest, with a token if the server asks for one, and build the page. */
export function begin(build) {
  $("error").querySelector("button").addEventListener("click", () => fail(null));
  $("token").addEventListener("submit", (event) => {
    event.preventDefault();
    headers.Authorization = `Bearer ${$("token-value").value}`;
    start(build);
  });
  start(build);
}

async function start(build) {
  let manifest;
  try {
    const address = new URL("bundle/manifest.json", ROOT);
    const response = await fetch(address, { headers, cache: "no-cache" });
    $("token").hidden = response.status !== 401;
    if (response.status === 401) {
      fail(headers.Authorization ? new InputError("The server does not accept this token.") : null);
      $("token-value").focus();
      return;
    }
    if (!response.ok) {
      throw new InputError(`The server answers ${response.status} when asked for its bundle.`);
    }
    manifest = await response.json();
  } catch (error) {
    fail(error instanceof InputError ? error : new Error("The server cannot be reached."));
    return;
  }
  fail(null);
  build(manifest);
}

/** Where learning is to run: "server" or "browser". */
export function place() {
  return document.querySelector("[name=where]:checked").value;
}

/** Open the bundle where it is to run, by the class for the server or that for the browser. */
export function openModel(Service, Background) {
  const where = place();
  if (!(where in models)) {
    say("Getting ready …");
  }
  const load = {
    server: () => Service.load(ROOT, headers),
    browser: () => openInBrowser(Background),
  };
  models[where] ??= load[where]().catch((error) => {
    delete models[where]; // so that the next time tries again
    throw error;
  });
  return models[where];
}

async function openInBrowser(Background) {
  const runtime = await fetch(RUNTIME, { headers });
  if (!runtime.ok) {
    throw new InputError(
      "This server does not have onnxruntime-web for browsers: run `make page` where it is " +
        "installed, or learn on the server.",
    );
  }
  return Background.load(new URL("bundle/", ROOT), RUNTIME, headers);
}

export function say(text) {
  $("status").textContent = text;
}

export function fail(error) {
  $("error").hidden = error === null;
  $("error").querySelector("p").textContent = error?.message ?? "";
  const known = error === null || error instanceof InputError || error instanceof ServiceError;
  if (!known) {
    console.error(error);
  }
}
