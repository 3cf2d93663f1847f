// Helpers of all tabs: elements, keyboard focus, formatted numbers.

export const find = (id) => document.getElementById(id);

/** Creates an element with attributes. String children become text, never HTML. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/**
 * Moves the focus among the items by two arrow keys, Home and End. For the Tab key they are one stop, the item that had
 * the focus last ("roving tabindex").
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

/** Submits a text box's form on Ctrl+Enter or Cmd+Enter. */
export function submitWithEnter(textarea) {
  textarea.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    textarea.form.requestSubmit();
  });
}

/** Shows a line that screen readers announce. */
export function say(status, line, isError = false) {
  status.textContent = line;
  status.classList.toggle("error", isError);
}

/** Shows a token, with its leading mark or space set apart, as that is not part of the word. */
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
