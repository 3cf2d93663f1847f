// The tab that shows each token's surprisal.

import { ask } from "./api.js";
import { count, duration, element, find, percent, plural, say } from "./dom.js";
import { moveFocusWith, shownToken, submitWithEnter } from "./dom.js";
import { segments } from "./text.js";

const LEVELS = [1, 2, 3, 4, 6, 8]; // nats at which the next colour begins
const HINT = "Choose a token to see how likely it was. ";
const KEYS = "← → move along the text, Enter asks what else could stand there.";

const box = find("score-text");
const results = find("score-results");
const status = find("score-status");
const holder = find("tokens");
const detail = find("token-detail");

/** Sets up the tab. `maskToken` gets a function from the mask token to the text with one token masked. */
export function startScore(maskToken) {
  find("legend").replaceChildren(
    ...[...LEVELS, Infinity].map((end, level) => {
      const begin = LEVELS[level - 1] ?? 0;
      const range = level === 0 ? `< ${end}` : end === Infinity ? `${begin} +` : `${begin}–${end}`;
      return element("span", { class: `level-${level}` }, range);
    }),
  );
  find("score-form").addEventListener("submit", (event) => {
    event.preventDefault();
    refresh(maskToken);
  });
  for (const choice of document.getElementsByName("pll")) {
    choice.addEventListener("change", () => results.hidden || refresh(maskToken));
  }
}

/** Shows the tab with a new text and asks at once. */
export function scoreText(text) {
  box.value = text;
  box.form.requestSubmit();
}

submitWithEnter(box);
box.addEventListener("input", () => results.hidden || say(status, "The text has changed since."));
moveFocusWith("ArrowLeft", "ArrowRight", holder, ".token");

async function refresh(maskToken) {
  const text = box.value;
  const pll = document.querySelector('[name="pll"]:checked').value;
  const answer = await ask("score", { inputs: text, parameters: { pll, per_token: true } }, status);
  if (!answer) return;
  const score = answer.data;
  showFigures(score);
  showTokens(text, score.per_token, maskToken);
  find("token-rows").replaceChildren(...score.per_token.map(showRow));
  results.hidden = false;
  say(status, `${plural(score.tokens, "token")} in ${duration(answer.milliseconds)}`);
}

const surprise = (token) => Math.max(0, -token.log_prob);

function showFigures(score) {
  const mean = score.tokens ? -score.pseudo_log_likelihood / score.tokens : null;
  const figures = [
    ["pseudo-perplexity", score.pseudo_perplexity, "exp of the mean surprisal: as uncertain as a choice among so many tokens"],
    ["pseudo-log-likelihood, nats", score.pseudo_log_likelihood, "the sum of log P(token | the rest)"],
    ["nats per token", mean, "the mean surprisal"],
  ].map(([name, value, title]) => figure(name, value === null ? "–" : readable(value), title, value));
  find("score-figures").replaceChildren(...figures, figure("tokens", count(score.tokens), "", score.tokens));
}

function figure(name, shown, title, value) {
  const data = element("data", { value: String(value ?? "") }, shown);
  return element("div", { title }, element("dt", {}, name), element("dd", {}, data));
}

function readable(value) {
  if (Math.abs(value) >= 1e7) return value.toExponential(2);
  return value.toLocaleString("en", { maximumFractionDigits: Math.abs(value) < 1000 ? 2 : 0 }).replace("-", "−");
}

function showTokens(text, tokens, maskToken) {
  detail.replaceChildren(HINT, element("span", { class: "keys" }, KEYS));
  const pieces = segments(text, tokens);
  const first = pieces.find((segment) => segment.tokens);
  find("unscored").hidden = !pieces.some((segment) => !segment.tokens && segment.text.trim());
  const parts = pieces.map((segment, at) => {
    if (!segment.tokens) return segment.text;
    const surprisal = segment.tokens.reduce((sum, token) => sum + surprise(token), 0);
    const level = LEVELS.filter((end) => surprisal >= end).length;
    const part = element(
      "span",
      {
        class: `token level-${level}${pieces[at - 1]?.tokens ? " joined" : ""}`,
        role: "button",
        tabindex: segment === first ? "0" : "-1",
        "aria-label": `${segment.text || segment.tokens[0].token_str}, ${surprisal.toFixed(1)} nats`,
      },
      segment.text,
    );
    const show = () => showDetail(segment, surprisal, askOthers);
    const askOthers = () => maskToken((mask) => masked(text, segment, mask));
    part.addEventListener("focus", show); // a click also sets the focus
    part.addEventListener("pointerenter", () => holder.contains(document.activeElement) || show());
    part.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      askOthers();
    });
    return part;
  });
  holder.replaceChildren(...parts);
}

const masked = (text, segment, mask) => {
  const points = Array.from(text);
  return points.slice(0, segment.start).join("") + mask + points.slice(segment.end).join("");
};

function showDetail(segment, surprisal, askOthers) {
  const probability = Math.exp(-surprisal);
  const odds = surprisal < 28 ? count(Math.max(1, Math.round(1 / probability))) : `e^${Math.round(surprisal)}`;
  const several = segment.tokens.length > 1 ? ` in ${segment.tokens.length} tokens` : "";
  const others = element("button", { type: "button" }, "What else could stand here?");
  others.addEventListener("click", askOthers);
  const name = element("b", {}, shownToken(segment.text || segment.tokens[0].token_str));
  const figures = `${several}: ${surprisal.toFixed(2)} nats, probability ${percent(probability)}, one in ${odds}`;
  detail.replaceChildren(element("span", {}, name, figures), others);
}

function showRow(token) {
  return element(
    "tr",
    {},
    element("th", { scope: "row" }, shownToken(token.token_str)),
    element("td", {}, surprise(token).toFixed(3)),
    element("td", {}, percent(Math.exp(token.log_prob))),
  );
}
