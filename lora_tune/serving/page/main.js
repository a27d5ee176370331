// The page: columns, prompt, keys and dialogs. Answers live in conversation.js, their cards in turn.js.

import { scoreLine, scoreTables } from './adapters.js';
import { ask, token } from './api.js';
import { Conversation, curl } from './conversation.js';
import { byId, make, say } from './dom.js';
import { promptAsTokens } from './tokens.js';
import { TurnView } from './turn.js';

const MOST = 3; // columns
let models = [];
let columns = []; // names of models
let conversation = new Conversation();
let views = [];
let keepsVotes = false;
let running = null; // AbortController of the answers that are being made

function start() {
  byId('theme').value = document.documentElement.dataset.theme ?? 'auto';
  byId('theme').addEventListener('change', event => chooseTheme(event.target.value));
  byId('composer').addEventListener('submit', event => { event.preventDefault(); send(); });
  byId('stop').addEventListener('click', () => running?.abort());
  byId('new').addEventListener('click', startAgain);
  byId('marks').addEventListener('change', () => views.forEach(view => view.mark()));
  byId('add-column').addEventListener('click', () => setColumns([...columns, next()]));
  byId('drop-column').addEventListener('click', () => setColumns(columns.slice(0, -1)));
  byId('draft-tokens').addEventListener('click', () => showDraft(byId('draft').hidden));
  byId('prompt').addEventListener('input', () => showDraft(false));
  byId('sampling').addEventListener('input', sayAboutSampling);
  byId('keys-open').addEventListener('click', () => byId('keys').showModal());
  document.addEventListener('keydown', onKey);
  setUpDialogs();
  sayAboutSampling();
  connect();
}

// Ask for the models; without the right token, ask for that first.
async function connect() {
  try {
    const found = await ask('compare/adapters');
    models = found.models;
    keepsVotes = found.votes;
    byId('votes-kept').hidden = !keepsVotes;
    byId('max_tokens').max = found.max_tokens;
    byId('max_tokens').value = Math.min(byId('max_tokens').value, found.max_tokens);
    sayAboutSampling();
    byId('alert').hidden = true;
    byId('token-open').hidden = !token.get();
  } catch (failure) {
    byId('about').textContent = 'No connection to the models yet.';
    return fail(failure);
  }
  const base = models.find(model => model.parent === null);
  const adapters = models.filter(model => model.parent !== null);
  byId('about').replaceChildren('Base ', make('strong', {}, base.name), `, ${adapters.length} ${adapters.length === 1 ? 'adapter' : 'adapters'}, served by ${location.host}`);
  byId('score-tables').replaceChildren(...scoreTables(models));
  const known = columns.filter(name => models.some(model => model.name === name));
  setColumns(known.length ? known : [base.name, (adapters[0] ?? base).name]);
}

function setColumns(names) {
  columns = names;
  byId('columns').replaceChildren(...columns.map(picker));
  byId('add-column').hidden = columns.length >= MOST;
  byId('drop-column').hidden = columns.length <= 2;
  showDraft(false);
}

// The model that a further column begins with: one that is not shown yet.
function next() {
  return (models.find(model => !columns.includes(model.name)) ?? models.at(-1)).name;
}

function picker(name, column) {
  const line = make('p', { class: 'soft scores' }, scoreLine(modelOf(name)));
  const select = make('select', { id: `column-${column + 1}` },
    ...models.map(model => make('option', { value: model.name, selected: model.name === name }, model.name)));
  select.addEventListener('change', () => {
    columns[column] = select.value;
    line.textContent = scoreLine(modelOf(select.value));
    showDraft(false);
  });
  return make('div', { class: `card c${column + 1}` },
    make('label', { htmlFor: select.id }, make('span', { class: 'badge' }, `${column + 1}`), ' Column ', `${column + 1}`), select, line);
}

function modelOf(name) {
  return models.find(model => model.name === name);
}

function system() {
  return byId('system').value.trim();
}

function sampling() {
  return Object.fromEntries(['temperature', 'top_p', 'max_tokens', 'seed'].map(id => [id, byId(id).valueAsNumber]));
}

function sayAboutSampling() {
  const { temperature, seed, max_tokens } = sampling();
  const how = temperature === 0 ? 'likeliest token' : `temperature ${temperature}, seed ${seed}`;
  byId('sampling-now').textContent = `${how}, up to ${max_tokens} tokens${system() ? ', with a system prompt' : ''}`;
}

function actions() {
  return { keepsVotes, retry, takeBack, fail, curl: showCurl, back: () => byId('prompt').focus() };
}

async function send() {
  if (running || !models.length) return models.length ? undefined : connect();
  const prompt = byId('prompt').value;
  if (!prompt.trim()) return byId('prompt').focus();
  if (!byId('composer').checkValidity()) byId('sampling').open = true;
  if (!byId('composer').reportValidity()) return undefined;
  byId('alert').hidden = true;
  const turn = conversation.add(prompt, columns, { system: system(), sampling: sampling() });
  const view = new TurnView(turn, conversation.turns.length, actions());
  views.push(view);
  byId('turns').append(view.element);
  byId('empty').hidden = true;
  byId('prompt').value = '';
  showDraft(false);
  const still = matchMedia('(prefers-reduced-motion: reduce)').matches;
  view.element.scrollIntoView({ block: 'start', behavior: still ? 'instant' : 'smooth' });
  await answer(view, view.cards);
}

// Answers of these cards, all at once; the other ones of the turn stay.
async function answer(view, cards) {
  running = new AbortController();
  setBusy(true);
  view.begin();
  await Promise.all(cards.map(card => card.run(running.signal)));
  running = null;
  view.end();
  views.forEach((other, i) => other.last(i === views.length - 1));
  setBusy(false);
  if (view.element.offsetHeight < innerHeight - byId('composer').offsetHeight) view.foot.scrollIntoView({ block: 'nearest' });
  const failed = cards.map(card => card.answer.failure).find(failure => failure?.kind === 'unauthorized');
  if (failed) fail(failed);
}

function retry(view, card) {
  if (!running) answer(view, [card]);
}

// Removes the last turn; its prompt may be changed and sent again.
function takeBack(view) {
  conversation.turns.pop();
  views.pop();
  view.element.remove();
  views.at(-1)?.last(true);
  byId('empty').hidden = views.length > 0;
  byId('new').hidden = !views.length;
  byId('prompt').value ||= view.turn.prompt;
  byId('prompt').focus();
  say('The last turn was taken back.');
}

function setBusy(busy) {
  const hadFocus = [byId('send'), byId('stop')].includes(document.activeElement);
  byId('send').hidden = busy;
  byId('stop').hidden = !busy;
  byId('new').hidden = busy || !views.length;
  if (hadFocus) (busy ? byId('stop') : byId('prompt')).focus();
}

function startAgain() {
  conversation = new Conversation();
  views = [];
  byId('turns').replaceChildren();
  byId('empty').hidden = false;
  byId('new').hidden = true;
  byId('prompt').focus();
  say('New conversation.');
}

// The prompt as it would be sent now, as tokens; columns that are fed the same share a panel.
async function showDraft(wanted) {
  const panel = byId('draft');
  byId('draft-tokens').setAttribute('aria-expanded', String(wanted));
  panel.hidden = !wanted;
  if (!wanted) return;
  const drafts = columns.map((model, column) => ({ model, messages: conversation.messages(column, byId('prompt').value, system()) }));
  const distinct = drafts.filter((draft, i) => drafts.findIndex(other => JSON.stringify(other) === JSON.stringify(draft)) === i);
  try {
    panel.replaceChildren(...await Promise.all(distinct.map(promptAsTokens)));
  } catch (failure) {
    showDraft(false);
    fail(failure);
  }
}

function fail(failure) {
  byId('alert').textContent = failure.message;
  byId('alert').hidden = false;
  if (failure.kind === 'unauthorized') openToken(token.get() ? 'The server refuses this token.' : '');
}

function openToken(why) {
  byId('token-open').hidden = false;
  byId('token-refused').textContent = why;
  byId('token-refused').hidden = !why;
  byId('token').value = '';
  byId('token-forget').hidden = !token.get();
  if (!byId('token-dialog').open) byId('token-dialog').showModal();
}

function setUpDialogs() {
  byId('token-open').addEventListener('click', () => openToken(''));
  byId('token-close').addEventListener('click', () => byId('token-dialog').close());
  byId('token-forget').addEventListener('click', () => { token.forget(); byId('token-dialog').close(); });
  byId('token-form').addEventListener('submit', () => {
    if (byId('token').value) token.set(byId('token').value);
    connect();
  });
  byId('curl-copy').addEventListener('click', async () => {
    byId('curl').select();
    try {
      await navigator.clipboard.writeText(byId('curl').value);
      byId('curl-note').textContent = 'Copied.';
    } catch {
      byId('curl-note').textContent = 'The browser does not let pages copy here; it is selected, copy it with the keyboard.';
    }
  });
}

function showCurl(answer) {
  byId('curl').value = curl(answer, { wantsToken: token.get() !== '' });
  byId('curl-note').textContent = token.get() ? 'The token is taken from LORA_TUNE_TOKEN, and not written here.' : '';
  byId('curl-dialog').showModal();
}

function chooseTheme(theme) {
  if (theme === 'auto') delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem('lora_tune.theme', theme);
  } catch {
    // storage is switched off: the choice holds for this visit
  }
}

function onKey(event) {
  if (document.querySelector('dialog[open]')) return;
  const control = event.ctrlKey || event.metaKey;
  if (control && event.key === 'Enter') {
    event.preventDefault();
    byId('composer').requestSubmit();
  } else if (control && event.key === '/') {
    event.preventDefault();
    byId('keys').showModal();
  } else if (event.key === 'Escape' && running) {
    running.abort();
  } else if (event.key === 'Escape') {
    const votes = views.at(-1)?.foot.querySelector('[role=group]');
    if (!votes) return;
    if (votes.contains(document.activeElement)) byId('prompt').focus();
    else votes.focus();
  }
}

start();
