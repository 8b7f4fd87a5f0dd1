// The script of analyze.py's report, behind report_page.js: compares two runs' arguments, and shows two runs' answers side
// by side with what judges said. The HTML and the data come from report.py.
//
// Answers, judgements, run ids and arguments are not ours and not trusted. They enter the page as text nodes only: what
// looks like HTML in them is shown, never parsed.

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children); // a string becomes a text node
  return element;
}

function fillSelect(select, options) {
  const before = select.value;
  select.replaceChildren(...options.map(([value, label]) => new Option(label, value)));
  choose(select, before);
}

function choose(select, value) {
  if ([...select.options].some((option) => option.value === value)) select.value = value;
}

// ---- unpacking ------------------------------------------------------------------------------

// DecompressionStream and Element.replaceChildren; in Chrome the latter is the younger of the two.
const UNABLE =
  "This browser is too old to unpack and show the answers. " +
  "Chrome and Edge can from version 86, Firefox from 113, Safari from 16.4.";

let report; // {runs, benches, questions, answers, judgements}, as report.py packed them
let bench; // name of the benchmark whose answers are read
let answersOf, judgementsOf; // keyOf(run, question) -> rows
let answered; // run -> its choice indices
let questionIds; // ascending
let severalRepeats;

async function unpack() {
  const binary = atob(find("data").textContent.trim());
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function keyOf(run, question) {
  return JSON.stringify([String(run), Number(question)]);
}

function groupRows(rows) {
  const groups = new Map();
  for (const row of rows) {
    const key = keyOf(row.run_id, row.question_id);
    if (groups.has(key)) groups.get(key).push(row);
    else groups.set(key, [row]);
  }
  return groups;
}

function indexBench() {
  const ownRows = (rows) => rows.filter((row) => row.bench === bench);
  const [answers, judgements] = [ownRows(report.answers), ownRows(report.judgements)];
  answersOf = groupRows(answers);
  judgementsOf = groupRows(judgements);
  const rows = [...answers, ...judgements];
  const runIds = new Set(rows.map((row) => String(row.run_id)));
  const listed = report.runs.map((run) => String(run.run_id)).filter((id) => runIds.has(id));
  answered = new Map([...listed, ...runIds].map((id) => [id, new Set()]));
  for (const row of rows) answered.get(String(row.run_id)).add(Number(row.choice ?? 0));
  questionIds = [...new Set(rows.map((row) => Number(row.question_id)))].sort((a, b) => a - b);
  severalRepeats = judgements.some((row) => row.repeat);
}

function questionOf(question) {
  return report.questions[bench]?.[question];
}

// ---- two runs compared ----------------------------------------------------------------------

function openDiff() {
  if (report.runs.length < 2) return;
  const options = report.runs.map((run, i) => [String(i), String(run.run_id)]);
  for (const id of ["diff-a", "diff-b"]) {
    fillSelect(find(id), options);
    find(id).addEventListener("change", showDiff);
  }
  find("diff-b").selectedIndex = 1;
  find("read-answers").addEventListener("click", readTheirAnswers);
  find("diff").hidden = false;
  showDiff();
}

function showDiff() {
  const [a, b] = ["diff-a", "diff-b"].map((id) => report.runs[Number(find(id).value)]);
  const [ofA, ofB] = [a, b].map((run) => new Map(Object.entries(run.arguments)));
  const names = [...new Set([...ofA.keys(), ...ofB.keys()])];
  const differing = names.filter((name) => ofA.get(name) !== ofB.get(name));
  find("diff-state").textContent = differing.length
    ? `${differing.length} of ${names.length} arguments differ; – marks an argument that the run does not have.`
    : `None of the ${names.length} arguments differ.`;
  find("diff-table").hidden = !differing.length;
  const makeRow = (tag, ...texts) => make("tr", "", ...texts.map((text) => make(tag, "", String(text))));
  const head = makeRow("th", "argument", a.run_id, b.run_id);
  const rows = differing.map((name) => makeRow("td", name, ofA.get(name) ?? "–", ofB.get(name) ?? "–"));
  find("diff-table").replaceChildren(make("table", "", make("thead", "", head), make("tbody", "", ...rows)));
  find("read-answers").hidden = ![a, b].every((run) => answered.has(String(run.run_id)));
}

function readTheirAnswers() {
  for (const side of ["a", "b"]) choose(find(`view-${side}`), find(`diff-${side}`).selectedOptions[0].textContent);
  changeView();
  find("answers").scrollIntoView();
}

// ---- the two answers that are compared ------------------------------------------------------

function sideOf(name) {
  return { name, run: find(`view-${name}`).value, choice: Number(find(`view-choice-${name}`).value) };
}

function bothSides() {
  return [sideOf("a"), sideOf("b")];
}

function answerOf(side, question) {
  const rows = answersOf.get(keyOf(side.run, question)) ?? [];
  return rows.find((row) => Number(row.choice ?? 0) === side.choice);
}

function judgementsFor(side, question) {
  const rows = judgementsOf.get(keyOf(side.run, question)) ?? [];
  return rows.filter((row) => Number(row.choice ?? 0) === side.choice);
}

// Arena-Hard's labels, where A is this answer; in order 2 it was shown as B. A strong win counts three times, as in the win rate.
const LABELS = { "A>>B": 1, "A>B": 1, "A=B": 0.5, "B>A": 0, "B>>A": 0 };

function timesCounted(row) {
  return row.grading === "pair" && row.preference === null && /^(A>>B|B>>A)$/.test(row.label) ? 3 : 1;
}

// What two runs are compared by: a rating, a reward, a preference, or a label. Null for MT-Bench's pairwise verdicts.
function valueOf(row) {
  if (row.grading !== "pair") return row.score;
  if (row.preference !== null) return row.preference;
  const value = LABELS[row.label] ?? null;
  return value !== null && String(row.order) === "2" ? 1 - value : value;
}

function isUnscored(row) {
  return row.grading === "pair" ? row.winner === null && valueOf(row) === null : row.score === null;
}

function judgeOf(row) {
  return row.grading === "pair" ? `${row.judge}, baseline ${row.baseline}` : row.judge;
}

function mean(numbers) {
  return numbers.reduce((sum, number) => sum + number, 0) / numbers.length;
}

function scoresByTurn(side, question) {
  const judge = find("view-judge").value;
  const scores = new Map();
  for (const row of judgementsFor(side, question)) {
    const value = valueOf(row);
    if (judgeOf(row) !== judge || value === null) continue;
    scores.set(row.turn, [...(scores.get(row.turn) ?? []), ...Array(timesCounted(row)).fill(value)]);
  }
  return scores;
}

function compareScores(question) {
  // Over the turns that the judge scored for both: a turn that failed on one side would tilt the difference.
  const [a, b] = bothSides().map((side) => scoresByTurn(side, question));
  const turns = [...a.keys()].filter((turn) => b.has(turn));
  if (!turns.length) return null;
  const [scoreA, scoreB] = [a, b].map((scores) => mean(turns.map((turn) => mean(scores.get(turn)))));
  return { a: scoreA, b: scoreB, difference: scoreA - scoreB, turns };
}

// ---- filters --------------------------------------------------------------------------------

function categoryOf(question) {
  return questionOf(question)?.category || "no category";
}

function passesDifference(question) {
  const wanted = find("view-difference").value;
  if (!wanted) return true;
  const scores = compareScores(question);
  if (!scores) return false;
  const tiny = 1e-9; // means of the same scores may differ in the last digit
  if (wanted === "a") return scores.difference > tiny;
  if (wanted === "b") return scores.difference < -tiny;
  if (wanted === "equal") return Math.abs(scores.difference) <= tiny;
  return Math.abs(scores.difference) >= Number(find("view-apart").value) - tiny;
}

function hasEmptyAnswer(side, question) {
  const answer = answerOf(side, question);
  return !answer || !answer.turns?.length || answer.turns.some((text) => !text.trim());
}

function passesFailure(question) {
  const wanted = find("view-failure").value;
  const unscored = () => bothSides().some((side) => judgementsFor(side, question).some(isUnscored));
  const empty = () => bothSides().some((side) => hasEmptyAnswer(side, question));
  if (wanted === "unscored") return unscored();
  if (wanted === "empty") return empty();
  return !wanted || unscored() || empty();
}

function passingQuestions() {
  const category = find("view-category").value;
  return questionIds.filter(
    (id) => (!category || categoryOf(id) === category) && passesDifference(id) && passesFailure(id),
  );
}

// ---- showing a question ---------------------------------------------------------------------

function roundScore(score) {
  return String(Number(score.toFixed(2))).replace("-", "−");
}

function describeScores(question) {
  const scores = compareScores(question);
  if (!scores) return "this judge scored no turn of both runs";
  const sign = scores.difference > 0 ? "+" : "";
  const over = scores.turns.length > 1 ? `mean over ${scores.turns.length} turns` : `turn ${scores.turns[0]} only`;
  const difference = `A − B = ${sign}${roundScore(scores.difference)}`;
  return `A ${roundScore(scores.a)}, B ${roundScore(scores.b)}, ${difference} (${find("view-judge").value}, ${over})`;
}

function describeResult(row) {
  const why = row.status && row.status !== "ok" ? ` (${row.status})` : "";
  if (row.grading === "reward") return row.score === null ? `no reward${why}` : `reward ${roundScore(row.score)}`;
  if (row.grading !== "pair") return row.score === null ? `no score${why}` : `score ${roundScore(row.score)}`;
  if (row.preference !== null) return `preference ${roundScore(row.preference)} (1: ${row.baseline}, 2: this answer)`;
  if (row.label !== null) return `label ${row.label} against ${row.baseline}`;
  if (row.winner === null) return `no verdict against ${row.baseline}${why}`;
  if (row.winner === "tie") return `tie with ${row.baseline}`;
  return `${row.winner === row.run_id ? "wins" : "loses"} against ${row.baseline}`;
}

function describeOrder(row) {
  if (row.grading !== "pair" || !row.order) return "";
  return String(row.order) === "1" ? ", shown to the judge as assistant A" : ", shown to the judge as assistant B";
}

function makeJudgement(row) {
  const repeat = severalRepeats ? `, repeat ${Number(row.repeat) + 1}` : "";
  const result = make("b", "", describeResult(row));
  const element = make("details", isUnscored(row) ? "judgement failed" : "judgement");
  element.open = find("view-judgements").checked;
  element.append(
    make("summary", "", result, ` by ${row.judge}${repeat}${describeOrder(row)}`),
    row.judgement ? make("div", "text", row.judgement) : make("p", "none", "The judge returned no text."),
  );
  return element;
}

function makeSide(side, question, turn) {
  const answer = answerOf(side, question);
  const text = answer?.turns?.[turn - 1];
  const scores = scoresByTurn(side, question).get(turn);
  const judgements = judgementsFor(side, question).filter((row) => (row.turn ?? 1) === turn);
  const missing = answer ? "The answer is empty." : "This run has no answer to this question.";
  const heading = [
    make("span", "letter", side.name.toUpperCase()),
    make("span", "", side.run),
    make("span", "score", scores ? `score ${roundScore(mean(scores))}` : ""),
  ];
  return make(
    "div",
    `side ${side.name}`,
    make("h5", "", ...heading),
    text?.trim() ? make("div", "text", text) : make("p", "none", missing),
    ...judgements.map(makeJudgement),
    ...(judgements.length ? [] : [make("p", "judgement none", "This answer has not been judged.")]),
  );
}

function makeTurn(question, turn) {
  const asked = questionOf(question)?.turns?.[turn - 1];
  return make(
    "section",
    "turn",
    make("h4", "", `Turn ${turn}`),
    asked ? make("div", "text asked", asked) : make("p", "none asked", "The text of this question is not available."),
    make("div", "sides", ...bothSides().map((side) => makeSide(side, question, turn))),
  );
}

function turnsOf(question) {
  const texts = [questionOf(question)?.turns, ...bothSides().map((side) => answerOf(side, question)?.turns)];
  const turns = new Set(texts.flatMap((list) => (list ?? []).map((_, i) => i + 1)));
  for (const side of bothSides()) judgementsFor(side, question).forEach((row) => turns.add(row.turn ?? 1));
  return [...turns].sort((x, y) => x - y);
}

function showQuestion(question) {
  if (question === undefined) {
    find("question").replaceChildren(make("p", "none", "No question passes these filters."));
    return;
  }
  const heading = make("h3", "", `Question ${question}, ${categoryOf(question)}`);
  const scores = make("span", "note", describeScores(question));
  const turns = turnsOf(question).map((turn) => makeTurn(question, turn));
  const none = turns.length ? [] : [make("p", "none", "Neither run has answered this question.")];
  find("question").replaceChildren(make("header", "", heading, scores), ...turns, ...none);
}

// ---- the view: controls, question, and the link that reopens it ------------------------------

const CONTROLS = ["a", "b", "choice-a", "choice-b", "category", "judge", "difference", "apart", "failure"];
let passing = []; // questions that pass the filters
let current; // the question shown; undefined if none passes
let saving; // timer of saveViewSoon

function openAnswers() {
  if (!questionIds.length) {
    find("answers-state").textContent = "There are no answers to read.";
    return;
  }
  fillSelect(find("view-bench"), report.benches.map(({ name, title }) => [name, title]));
  find("view-bench").parentElement.hidden = report.benches.length < 2;
  fillBench();
  find("answers-state").hidden = true;
  find("browser").hidden = false;
  if (!recallView()) updateView();
}

function openBench() {
  bench = find("view-bench").value;
  indexBench();
  fillBench();
  current = undefined;
}

function changeBench() {
  openBench();
  changeView();
}

// The runs, categories and judges of a benchmark. What was chosen stays chosen where it is offered.
function fillBench() {
  const runs = [...answered.keys()].map((id) => [id, id]);
  fillSelect(find("view-a"), runs);
  fillSelect(find("view-b"), runs);
  if (find("view-a").value === find("view-b").value) find("view-b").selectedIndex = Math.min(1, runs.length - 1);
  const categories = [...new Set(questionIds.map(categoryOf))];
  fillSelect(find("view-category"), [["", "all"], ...categories.map((name) => [name, name])]);
  const judged = report.judgements.filter((row) => row.bench === bench);
  const scored = judged.filter((row) => row.grading !== "pair" || valueOf(row) !== null);
  const judges = [...new Set(scored.map(judgeOf))];
  fillSelect(find("view-judge"), judges.length ? judges.map((name) => [name, name]) : [["", "none"]]);
  const leftOut = report.benches.find(({ name }) => name === bench)?.left_out;
  find("left-out").hidden = !leftOut;
  find("left-out").textContent = `${leftOut} more questions are left out here: the file would be too large.`;
}

function updateView() {
  for (const side of ["a", "b"]) {
    const choices = [...answered.get(find(`view-${side}`).value)].sort((x, y) => x - y);
    fillSelect(find(`view-choice-${side}`), choices.map((choice) => [String(choice), String(choice + 1)]));
    find(`view-choice-${side}`).parentElement.hidden = choices.length < 2;
  }
  find("view-apart").parentElement.hidden = find("view-difference").value !== "apart";
  passing = passingQuestions();
  showPosition(passing.includes(current) ? current : passing[0]);
}

function showPosition(question) {
  current = question;
  const index = passing.indexOf(current);
  find("position").textContent = `${index + 1} of ${passing.length}`;
  find("previous").disabled = index <= 0;
  find("next").disabled = index === passing.length - 1;
  fillSelect(find("view-question"), passing.map((id) => [String(id), `${id}, ${categoryOf(id)}`]));
  find("view-question").value = String(current);
  showQuestion(current);
}

function changeView() {
  updateView();
  saveViewSoon();
}

function step(by) {
  const question = passing[passing.indexOf(current) + by];
  if (question === undefined) return;
  showPosition(question);
  saveViewSoon();
  const bars = document.querySelector(".position").getBoundingClientRect().bottom;
  if (find("question").getBoundingClientRect().top < bars) find("question").scrollIntoView();
}

function goToQuestion() {
  showPosition(Number(find("view-question").value));
  saveViewSoon();
}

function clearFilters() {
  for (const name of ["category", "difference", "failure"]) find(`view-${name}`).value = "";
  changeView();
}

function saveViewSoon() {
  clearTimeout(saving); // browsers limit how often a page may change its address
  saving = setTimeout(saveView, 150);
}

function saveView() {
  const state = new URLSearchParams({ q: current ?? "" });
  state.set("bench", bench);
  for (const name of CONTROLS) state.set(name, find(`view-${name}`).value);
  if (!find("view-judgements").checked) state.set("judgements", "no");
  history.replaceState(null, "", `#answers?${state}`);
}

function recallView() {
  if (!location.hash.startsWith("#answers?")) return false;
  const state = new URLSearchParams(location.hash.slice("#answers?".length));
  const set = (name) => {
    const control = find(`view-${name}`);
    if (!state.has(name)) return;
    if (control.options) choose(control, state.get(name));
    else if (Number(state.get(name)) >= 0) control.value = state.get(name);
  };
  set("bench");
  openBench();
  CONTROLS.forEach(set);
  find("view-judgements").checked = state.get("judgements") !== "no";
  current = Number(state.get("q"));
  updateView(); // offers the answers of the runs that were just set
  set("choice-a");
  set("choice-b");
  updateView();
  find("answers").scrollIntoView();
  return true;
}

function handleKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || find("browser").hidden || find("enlarged").open) return;
  if (event.target.closest("input, select, textarea, .scroll")) return; // these use the keys themselves
  const place = find("answers").getBoundingClientRect();
  if (place.bottom < 0 || place.top > innerHeight) return; // out of sight
  const by = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 }[event.key];
  if (by) step(by);
}

// ---- start ----------------------------------------------------------------------------------

function listen() {
  for (const name of CONTROLS) find(`view-${name}`).addEventListener("change", changeView);
  find("view-bench").addEventListener("change", changeBench);
  find("view-judgements").addEventListener("change", changeView);
  find("view-question").addEventListener("change", goToQuestion);
  find("previous").addEventListener("click", () => step(-1));
  find("next").addEventListener("click", () => step(1));
  find("clear").addEventListener("click", clearFilters);
}

async function openReport() {
  listen();
  if (typeof DecompressionStream === "undefined" || !Element.prototype.replaceChildren) {
    find("answers-state").textContent = UNABLE;
    return;
  }
  try {
    report = await unpack();
  } catch (error) {
    find("answers-state").textContent = `The answers in this file are damaged (${error.message}). Rerun analyze.py.`;
    return;
  }
  bench = report.benches[0]?.name;
  indexBench();
  openDiff();
  openAnswers();
  document.addEventListener("keydown", handleKey);
  window.addEventListener("hashchange", recallView);
}

document.addEventListener("DOMContentLoaded", openReport);
