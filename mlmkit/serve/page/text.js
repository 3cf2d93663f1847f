// Where a token goes in a text. No page here: only strings.

const BLANK = "\ue000"; // one character in place of a mask, so that no cut goes through it
const WORD = /[\p{L}\p{N}\p{M}]/u;
const UNSPACED = /[\p{sc=Han}\p{sc=Hiragana}\p{sc=Katakana}\p{sc=Thai}\p{sc=Lao}\p{sc=Khmer}\p{sc=Myanmar}]/u;
const PIECE = /^##(?=[\p{L}\p{N}\p{M}])/u; // WordPiece's mark; "##" alone is a heading
const startsWord = (text) => text !== undefined && WORD.test(text) && !UNSPACED.test(text);

export const countMasks = (text, mask) => text.split(mask).length - 1;

/**
 * The change that puts a candidate in place of the index-th mask: `text.slice(0, start) + filled + text.slice(end)`.
 *
 * A token may belong to the word before it ("##ing", or "ing" of a byte-level vocabulary), or bring its space along.
 * Where its spelling does not say, the server's `sequence` does. What the user typed around the mask stays.
 */
export function fillMask(text, mask, index, candidates, candidate) {
  const pieces = text.split(mask);
  const position = pieces.slice(0, index + 1).join(mask).length;
  const before = text.slice(0, position);
  const token = candidate.token_str;
  const word = token.replace(PIECE, "").trimStart();
  const end = position + mask.length;
  const spaced = /^\s/.test(token);
  if (!spaced && (PIECE.test(token) || isJoined(candidates, candidate, word))) {
    const kept = before.replace(/ +$/, "");
    if (kept && !kept.endsWith("\n")) return { start: kept.length, end, filled: word };
  }
  const apart = spaced
    ? before !== "" && !/\s$/.test(before)
    : wouldRunTogether(before, word) && isJoined(candidates, candidate, word) === false;
  return { start: position, end, filled: (apart ? " " : "") + word };
}

const wouldRunTogether = (before, word) => startsWord(Array.from(before).at(-1)) && startsWord(Array.from(word)[0]);

/** Whether the model's own text has the candidate right after the word before; undefined where one cannot tell. */
function isJoined(candidates, candidate, word) {
  // The sequences of one mask are the same up to the candidate.
  let shared = candidates[0].sequence;
  for (const { sequence } of candidates) while (!sequence.startsWith(shared)) shared = shared.slice(0, -1);
  const at = word ? candidate.sequence.lastIndexOf(word, shared.length + 1) : -1;
  return at < 1 ? undefined : !/\s/.test(candidate.sequence[at - 1]);
}

/** The text around the index-th mask, `reach` characters each way: strings and, for each mask, its number from 0. */
export function excerpt(text, mask, index, reach = 90) {
  const points = Array.from(text.replaceAll(BLANK, " ").split(mask).join(BLANK).replace(/\s+/g, " "));
  const blanks = points.flatMap((point, at) => (point === BLANK ? [at] : []));
  const from = Math.max(0, blanks[index] - reach);
  const to = Math.min(points.length, blanks[index] + 1 + reach);
  const first = blanks.findIndex((at) => at >= from);
  const parts = points.slice(from, to).join("").split(BLANK);
  const shown = parts.flatMap((part, number) => (number ? [first + number - 1, part] : [part]));
  return [from > 0 ? "…" : "", ...shown, to < points.length ? "…" : ""].filter((part) => part !== "");
}

/**
 * The text cut into pieces, `{text, start, end, tokens}`, offsets in code points. Text between tokens has no `tokens`.
 *
 * Tokens that share a character (the bytes of an emoji) share a piece; white space at a token's edges is not its own.
 */
export function segments(text, tokens) {
  const points = Array.from(text);
  const groups = [];
  for (const token of tokens) {
    const last = groups.at(-1);
    if (last && (token.start < last.end || token.start === token.end || last.start === last.end)) {
      last.end = Math.max(last.end, token.end);
      last.tokens.push(token);
    } else {
      groups.push({ start: token.start, end: token.end, tokens: [token] });
    }
  }
  const isSpace = (at) => /\s/.test(points[at]);
  const found = [];
  let done = 0;
  const add = (start, end, tokens) => {
    if (end > start || tokens) found.push({ text: points.slice(start, end).join(""), start, end, tokens });
    done = end;
  };
  for (const group of groups) {
    let { start, end } = group;
    while (start < end && isSpace(start)) start += 1;
    while (end > start && isSpace(end - 1)) end -= 1;
    if (start === end) ({ start, end } = group); // a token of white space alone
    add(done, start, null);
    add(start, end, group.tokens);
  }
  add(done, points.length, null);
  return found;
}
