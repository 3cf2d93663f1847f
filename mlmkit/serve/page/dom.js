// What the tabs share: making elements, keys that move the focus, figures for people.

export const find = (id) => document.getElementById(id);

/** An element with attributes. Children that are strings become text, never HTML. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/**
 * Two arrow keys, Home and End move the focus among the items, which are one stop of the Tab key ("roving tabindex"):
 * the one that had the focus last.
 */
export function moveFocusWith(back, forth, container, selector) {
  container.addEventListener("focusin", ({ target }) => {
    if (!target.matches(selector)) return;
    for (const item of container.querySelectorAll('[tabindex="0"]')) item.tabIndex = -1;
    target.tabIndex = 0;
  });
  container.addEventListener("keydown", (event) => {
    const items = [...container.querySelectorAll(selector)];
    const at = items.indexOf(document.activeElement);
    const to = { [back]: at - 1, [forth]: at + 1, Home: 0, End: items.length - 1 }[event.key];
    if (at < 0 || to === undefined || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    items[(to + items.length) % items.length].focus();
  });
}

/** Ctrl or Cmd with Enter sends the form of a text box. */
export function submitWithEnter(textarea) {
  textarea.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    textarea.form.requestSubmit();
  });
}

/** Shows a line where screen readers notice it. */
export function say(status, line, isError = false) {
  status.textContent = line;
  status.classList.toggle("error", isError);
}

/** A token as one can see it: the mark or space before it apart, as it is no part of the word. */
export function shownToken(text) {
  const [, mark, word] = /^(##|\s*)(.*)$/su.exec(text);
  const visible = mark.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  const parts = visible ? [element("span", { class: "mark" }, visible), word] : [word];
  return element("span", { class: "token-name" }, ...parts);
}

export function percent(probability) {
  const value = 100 * probability;
  if (value > 0 && value < 0.01) return "< 0.01 %";
  return `${value.toFixed(value < 10 ? 2 : 1)} %`;
}

export const count = (number) => number.toLocaleString("en");
export const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;
export const duration = (milliseconds) =>
  milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
