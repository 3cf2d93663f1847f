// The page's tabs, and the model's description, loaded when the page opens.

import { ask } from "./api.js";
import { find, moveFocusWith, say } from "./dom.js";
import { fillText, startFill } from "./fill.js";
import { showModel } from "./model.js";
import { scoreText, startScore } from "./score.js";

const tabs = [...document.querySelectorAll('[role="tab"]')];

function select(tab) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    find(other.getAttribute("aria-controls")).hidden = !chosen;
  }
}

for (const tab of tabs) {
  tab.addEventListener("click", () => select(tab));
  tab.addEventListener("focus", () => select(tab));
}
moveFocusWith("ArrowLeft", "ArrowRight", document.querySelector('[role="tablist"]'), '[role="tab"]');

if (/Mac|iPhone|iPad/.test(navigator.platform)) {
  find("insert-mask").querySelector("kbd").textContent = "⌥ M";
  for (const key of document.querySelectorAll("[data-modifier]")) key.textContent = "⌘ ↵";
}

startScore((makeText) => {
  select(find("tab-fill"));
  fillText(makeText);
});

const answer = await ask("info", null, find("model-status"));
if (answer) {
  const info = answer.data;
  document.title = `${info.name} · mlmkit`;
  for (const id of ["fill-text", "fill-results", "score-text", "tokens", "token-rows"]) find(id).lang = info.language;
  find("model-line").textContent = `${info.name} · ${info.precision} · ${info.backend} on ${info.device}`;
  find("model-card").replaceChildren(...showModel(info));
  say(find("model-status"), "");
  startFill(info, (text) => {
    select(find("tab-score"));
    scoreText(text);
  });
} else {
  say(find("fill-status"), find("model-status").textContent, true);
}
