// Placing tokens in a text. Pure functions of strings.

const BLANK = "\ue000"; // stands for a mask as one character, so that no cut splits it
const WORD = /[\p{L}\p{N}\p{M}]/u;
const UNSPACED = /[\p{sc=Han}\p{sc=Hiragana}\p{sc=Katakana}\p{sc=Thai}\p{sc=Lao}\p{sc=Khmer}\p{sc=Myanmar}]/u;
const PIECE = /^##(?=[\p{L}\p{N}\p{M}])/u; // WordPiece's mark; "##" alone is a heading
const startsWord = (text) => text !== undefined && WORD.test(text) && !UNSPACED.test(text);

export const countMasks = (text, mask) => text.split(mask).length - 1;

/**
 * The edit that replaces the index-th mask by a candidate: `text.slice(0, start) + filled + text.slice(end)`.
 *
 * A token may continue the word before it ("##ing", or "ing" of a byte-level vocabulary), or include a leading space.
 * If its spelling does not show which, the server's `sequence` does. The user's text around the mask does not change.
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

/** Whether the model's own text joins the candidate to the word before it; undefined if that cannot be known. */
function isJoined(candidates, candidate, word) {
  // All sequences of one mask are equal up to the candidate.
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
 * The text in pieces `{text, start, end, tokens}`, offsets in code points. Text between tokens has no `tokens`.
 *
 * Tokens that share a character (the bytes of an emoji) share a piece. White space at a token's edges is left out of it.
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
  const pieces = [];
  let done = 0;
  const add = (start, end, tokens) => {
    if (end > start || tokens) pieces.push({ text: points.slice(start, end).join(""), start, end, tokens });
    done = end;
  };
  for (const group of groups) {
    let { start, end } = group;
    while (start < end && isSpace(start)) start += 1;
    while (end > start && isSpace(end - 1)) end -= 1;
    if (start === end) ({ start, end } = group); // a token of white space only
    add(done, start, null);
    add(start, end, group.tokens);
  }
  add(done, points.length, null);
  return pieces;
}
