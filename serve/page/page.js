// Two answers to a prompt side by side, a person's vote on them, and what became of one's votes.

import { Refused, getJson, postForEvents, postJson, refusedAs, sendAgain, token } from "./server.js";

const SIDES = ["first", "second"];
const ROLES = { system: "System", developer: "Developer", user: "User", assistant: "Assistant" };
const START = "Write a prompt, or draw one.";
const SAYS = { first: "answer 1 is better", second: "answer 2 is better", tie: "a tie", both_bad: "both are bad" };
const KEYS = {
  ArrowLeft: "first", 1: "first", ArrowRight: "second", 2: "second",
  ArrowDown: "tie", 0: "tie", t: "tie", b: "both_bad",
};

const $ = (id) => document.getElementById(id);
const state = {
  phase: "idle", // then "writing", "voting", "sending", "voted"
  comparison: null,
  writing: null, // Ends the answers that are being written.
  vote: null, // The last one, while it may be undone.
  sent: null, // A vote that is not known to be kept.
};

// What is seen

function enter(phase) {
  state.phase = phase;
  $("comparison").hidden = phase === "idle";
  $("votes").hidden = phase === "idle" || phase === "voted";
  $("next").hidden = phase !== "voted";
  $("why").hidden = phase === "voted";
  $("reason").disabled = phase !== "voting";
  for (const button of $("votes").children) button.disabled = phase !== "voting";
  for (const side of SIDES) part(side, "text").ariaBusy = phase === "writing";
  showUndo();
}

function showUndo() {
  $("undo").hidden = state.vote === null || state.phase === "sending";
}

function part(side, name) {
  return $(side).querySelector(`.${name}`);
}

function say(text, { trouble = false } = {}) {
  $("status").textContent = text;
  $("status").classList.toggle("trouble", trouble);
}

function complain(error) {
  if (!(error instanceof Refused)) throw error;
  say(error.message, { trouble: true });
  askForToken(error);
}

function askForToken({ status, message }) {
  if (status !== 401 && !(status === 403 && token.get())) return;
  $("token-note").textContent = message;
  $("token-form").hidden = false;
  $("token").focus();
}

function showTurns({ prompt, messages }) {
  const turns = messages ?? [{ role: "prompt", content: prompt }];
  $("turns").replaceChildren(...turns.map(turn));
}

function turn({ role, content }) {
  const [item, name, text] = ["li", "b", "p"].map((tag) => document.createElement(tag));
  name.textContent = ROLES[role] ?? "Text to go on with";
  text.textContent = content;
  text.dir = "auto";
  item.append(name, text);
  return item;
}

function clearAnswers() {
  hideVersions();
  for (const side of SIDES) part(side, "text").textContent = part(side, "note").textContent = "";
  $("reason").value = "";
}

function hideVersions() {
  for (const side of SIDES) {
    part(side, "version").textContent = "version hidden";
    part(side, "verdict").textContent = "";
    $(side).classList.remove("chosen");
  }
}

function showVersions(versions, choice) {
  const verdict = { tie: "= tie", both_bad: "✗ bad" }[choice];
  for (const side of SIDES) {
    part(side, "version").textContent = `version ${versions[side]}`;
    part(side, "verdict").textContent = verdict ?? (side === choice ? "✓ better" : "");
    $(side).classList.toggle("chosen", side === choice);
  }
}

function authors({ first, second }) {
  if (first === second) return `Version ${first} wrote both.`;
  return `Version ${first} wrote answer 1, version ${second} answer 2.`;
}

function note({ text, finish_reason: finish }) {
  if (!text.trim()) return "This answer is empty.";
  return finish === "length" ? "Cut off at the longest length." : "";
}

// What a person does

function ask() {
  const text = $("prompt").value;
  if (state.phase === "sending") return;
  if (text.trim()) {
    compare($("kind").value === "prompt" ? { prompt: text } : { messages: [{ role: "user", content: text }] });
  } else {
    say("Write a prompt first, or draw one.");
    $("prompt").focus();
  }
}

async function draw() {
  if (state.phase === "sending") return;
  say("A prompt is being drawn …");
  try {
    const prompt = await getJson("v1/comparisons/prompt");
    $("kind").value = prompt.messages ? "messages" : "prompt";
    compare(prompt);
  } catch (error) {
    complain(error);
    if (error.status === 404) $("prompt").focus();
  }
}

async function compare(prompt) {
  state.writing?.abort();
  const writing = new AbortController();
  Object.assign(state, { writing, comparison: null });
  showTurns(prompt);
  clearAnswers();
  enter("writing");
  $("comparison").focus({ preventScroll: true });
  $("comparison").scrollIntoView();
  say("Two answers are being written …");
  try {
    for await (const event of postForEvents("v1/comparisons", { ...prompt, stream: true }, writing.signal)) take(event);
    if (!state.comparison) throw refusedAs(503, "it stopped in the middle of the answers: ask again");
    enter("voting");
    say(state.comparison.identical ? "Both answers are the same: go on, or vote tie." : "Which answer is better?");
  } catch (error) {
    if (writing.signal.aborted) return;
    enter("idle");
    complain(error);
  }
}

function take(event) {
  if (event.error) throw refusedAs(event.error.code, event.error.message);
  if (event.side) return part(event.side, "text").append(event.text);
  state.comparison = event;
  for (const side of SIDES) {
    part(side, "text").textContent = event[side].text;
    part(side, "note").textContent = note(event[side]);
  }
}

async function vote(choice) {
  if (state.phase !== "voting") return;
  const comparison = state.comparison.id;
  enter("sending");
  say("Your vote is being kept …");
  try {
    const receipt = await keep({ comparison_id: comparison, choice, reason: $("reason").value });
    state.vote = { id: receipt.id, comparison };
    showVersions(receipt.versions, choice);
    enter("voted");
    $("next").focus({ preventScroll: true });
    say(`Your vote is kept: ${SAYS[choice]}. ${authors(receipt.versions)}`);
    showMine();
  } catch (error) {
    enter("voting");
    complain(error);
  }
}

// The key stays the same until the vote is known to be kept: however often it arrives, it counts once.
async function keep(vote) {
  const body = JSON.stringify(vote);
  if (state.sent?.body !== body) state.sent = { body, key: newKey() };
  const { key } = state.sent;
  const receipt = await sendAgain(
    () => postJson("v1/preferences", vote, key),
    (why) => say(`${why} Your vote is sent again.`, { trouble: true }),
  );
  state.sent = null;
  return receipt;
}

function newKey() {
  return crypto.getRandomValues(new Uint32Array(4)).join("-");
}

async function undo() {
  const undone = state.vote;
  if (undone === null || state.phase === "sending") return;
  state.vote = null;
  showUndo();
  try {
    await postJson("v1/preferences/undo", { id: undone.id });
  } catch (error) {
    if (error.status !== 409) state.vote = undone;
    showUndo();
    return complain(error);
  }
  say("Your last vote is undone.");
  if (undone.comparison === state.comparison?.id) {
    hideVersions();
    enter("voting");
    say("Your vote is undone: vote again, or go on.");
  }
  showMine();
}

// What became of votes

async function showMine() {
  try {
    const mine = await getJson("v1/preferences/mine");
    const rounds = mine.rounds.map(({ round }) => round);
    const shown = { ...mine, rounds: ranges(rounds), versions: ranges(mine.versions) };
    for (const value of $("mine").querySelectorAll("dd")) value.textContent = shown[value.dataset.of];
    $("mine-note").textContent = "";
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    $("mine-note").textContent = `Not up to date. ${error.message}`;
    askForToken(error);
  }
}

function ranges(numbers) {
  const runs = [];
  for (const number of numbers) {
    if (runs.at(-1)?.[1] === number - 1) runs.at(-1)[1] = number;
    else runs.push([number, number]);
  }
  return runs.map(([from, to]) => (from === to ? from : `${from}–${to}`)).join(", ") || "none yet";
}

// Tokens and keys

function changePerson() {
  state.vote = null;
  showUndo();
  $("token-form").hidden = true;
  $("forget").hidden = token.get() === null;
  showMine();
}

function press(event) {
  if (event.repeat) return;
  const typing = event.target.matches("input:not([type=checkbox]), textarea, select");
  const isSend = event.key === "Enter" && (event.ctrlKey || event.metaKey);
  if (isSend && (!typing || event.target === $("prompt"))) ask();
  if (typing && event.key === "Escape") event.target.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !$("keys").checked) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === "n") draw();
  if (key === "u") undo();
  if (key in KEYS && state.phase === "voting") {
    event.preventDefault();
    vote(KEYS[key]);
  }
}

function onSubmit(id, act) {
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    act();
  });
}

onSubmit("ask", ask);
onSubmit("token-form", () => {
  token.set($("token").value.trim());
  $("token").value = "";
  if (state.phase === "idle") say(START);
  changePerson();
});
$("forget").addEventListener("click", () => {
  token.forget();
  changePerson();
});
$("draw").addEventListener("click", draw);
$("next").addEventListener("click", draw);
$("undo").addEventListener("click", undo);
$("votes").addEventListener("click", (event) => vote(event.target.closest("button")?.value));
document.addEventListener("keydown", press);
document.addEventListener("visibilitychange", () => document.hidden || showMine());
changePerson();
