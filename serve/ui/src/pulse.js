// What the server does now and did in the last minutes.

import { call } from "./api.js";
import { byId, fixed, h, short } from "./dom.js";
import { plot } from "./plot.js";

const EVERY = 2000; // ms

/** Asks now and then, while the page is looked at. */
export async function keepPulse() {
  for (;;) {
    if (!document.hidden) {
      try {
        show(await call("pulse"));
      } catch {
        byId("glance").replaceChildren(h("span", { class: "lamp bad" }), "not reached");
      }
    }
    await new Promise((done) => setTimeout(done, EVERY));
  }
}

function show({ queue, now, whole, spans }) {
  const ms = (seconds) => (seconds == null ? "–" : fixed(1000 * seconds, seconds < 0.01 ? 2 : 1));
  const waiting = queue.requests ? `${queue.requests} waiting` : "idle";
  byId("glance").replaceChildren(
    h("span", { class: queue.requests ? "lamp busy" : "lamp" }),
    now.moving ? `${now.moving} moving` : waiting);
  const last = spans.at(-1);
  const rate = (name) => short(last ? last[name] / last.seconds : 0);
  const cards = [
    ["Waiting", [[short(queue.requests), "requests"], [short(queue.atoms), "atoms"], [short(queue.edges), "edges"]]],
    ["Under way", [[short(now.in_flight), "requests"], [short(now.moving), "moving"], [short(now.sessions), "sessions"]]],
    ["Latency", [[ms(whole.p50), "ms, median"], [ms(whole.p99), "ms, 99 %"], [short(whole.answers), "answers"]]],
    ["Throughput", [[rate("structures"), "structures/s"], [rate("atoms"), "atoms/s"], [rate("edges"), "edges/s"]]],
  ];
  byId("tiles").replaceChildren(...cards.map(([name, values]) => h("div", { class: "card" }, h("h2", {}, name),
    h("div", { class: "values" }, ...values.map(([value, unit]) => h("div", {}, h("div", { class: "value" }, value), h("div", { class: "soft" }, unit)))))));
  const from = spans.length ? `−${Math.round(spans[0].ago + spans[0].seconds)} s` : "";
  const scaled = (name) => spans.map((span) => (span[name] == null ? null : 1000 * span[name]));
  // In pixels, so that their words are as large as all others.
  const wide = byId("latency-plot").clientWidth || Math.min(560, window.innerWidth - 60);
  plot(byId("latency-plot"), { lines: [{ name: "p50", values: scaled("p50") }, { name: "p99", values: scaled("p99") }], from, to: "now", unit: "ms", zero: true, width: wide });
  plot(byId("rate-plot"), { lines: [{ name: "structures/s", values: spans.map((span) => span.structures / span.seconds) }], from, to: "now", zero: true, width: wide });
}
