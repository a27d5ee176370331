// A turn on the page: the prompt, one card for each column, differences, votes.

import { compare } from './diff.js';
import { button, byId, make, number, plural, say } from './dom.js';
import { promptAsTokens } from './tokens.js';
import { voteBar } from './votes.js';

const ENDS = { stop: 'ended by itself', length: 'cut: as many new tokens as allowed', content_filter: 'filtered', tool_calls: 'called a tool' };

let cards = 0; // made so far

// How a turn was asked, in a few words.
function how({ sampling, messages }) {
  const { temperature, top_p, max_tokens, seed } = sampling;
  const drawn = temperature === 0 ? 'likeliest tokens' : `temperature ${temperature}, top p ${top_p}, seed ${seed}`;
  return `${drawn}, up to ${number(max_tokens)} new${messages[0].role === 'system' ? ', with a system prompt' : ''}`;
}

// `actions`: keepsVotes, retry(view, card), takeBack(view), curl(answer), back(), fail(failure).
export class TurnView {
  constructor(turn, place, actions) {
    Object.assign(this, { turn, actions, ended: false });
    this.cards = turn.answers.map((answer, column) => new Card(this, answer, column));
    this.foot = make('div');
    this.undo = button('Take back', () => actions.takeBack(this), { hidden: true, title: 'Removes this turn, and puts its prompt back to be changed' });
    this.adopted = make('p', { class: 'soft', hidden: true });
    this.element = make('article', { class: 'turn', 'aria-label': `Turn ${place}` },
      make('h3', { class: 'unseen' }, `Turn ${place}`),
      make('div', { class: 'asked' }, make('h4', {}, 'You'), make('p', { class: 'text' }, turn.prompt), make('p', { class: 'soft facts' }, how(turn.answers[0])), make('div', { class: 'line small' }, this.undo)),
      make('div', { class: 'columns' }, ...this.cards.map(card => card.element)),
      this.adopted, this.foot);
  }

  // All answers have ended: differences are marked, and there may be a vote.
  end() {
    this.ended = true;
    this.mark();
    if (this.actions.keepsVotes) this.foot.replaceChildren(voteBar(this.turn, { onFailure: this.actions.fail, back: this.actions.back }));
  }

  // Only the last turn can be taken back.
  last(isLast) {
    this.undo.hidden = !isLast || !this.ended;
  }

  // An answer is tried again: what was said about all of them holds no more.
  begin() {
    this.ended = false;
    this.foot.replaceChildren();
    this.undo.hidden = true;
    this.cards.forEach(card => card.plain());
  }

  // Marks the words that only one answer has, or shows the plain texts.
  mark() {
    const whole = this.cards.filter(card => card.answer.usable);
    const wanted = this.ended && byId('marks').checked && whole.length > 1;
    this.cards.forEach(card => card.plain());
    if (!wanted) return;
    compare(whole.map(card => card.answer.text)).forEach((runs, i) => {
      const twin = whole.find(card => card !== whole[i] && card.answer.text === whole[i].answer.text);
      whole[i].show(runs, twin);
    });
  }

  adopt(column) {
    this.turn.adopted = this.turn.adopted === column ? null : column;
    this.cards.forEach(card => card.adoption.setAttribute('aria-pressed', String(card.column === this.turn.adopted)));
    this.adopted.hidden = this.turn.adopted === null;
    this.adopted.textContent = this.turn.adopted === null ? '' : `From here all columns go on with answer ${this.turn.adopted + 1}.`;
  }
}

// How many of an answer's words no other answer has.
function lonely(own, all) {
  if (own === all) return 'altogether another answer';
  return `${own ? number(own) : 'none'} of ${plural(all, 'word')} ${own === 1 ? 'stands' : 'stand'} only here`;
}

// A marked run, the white space before it left out of the mark.
function marked(text) {
  const start = text.length - text.trimStart().length;
  return [text.slice(0, start), make('mark', {}, text.slice(start))];
}

class Card {
  constructor(view, answer, column) {
    Object.assign(this, { view, answer, column });
    const { actions } = view;
    this.text = make('p', { class: 'text' });
    this.facts = make('p', { class: 'soft facts' });
    this.difference = make('p', { class: 'soft', hidden: true });
    this.problem = make('p', { class: 'problem', hidden: true });
    this.under = make('div', { id: `tokens-${++cards}`, hidden: true });
    this.adoption = button('Continue all from here', () => view.adopt(column), { 'aria-pressed': 'false' });
    this.tokens = button('Prompt as tokens', () => this.toggleTokens(), { 'aria-expanded': 'false', 'aria-controls': this.under.id });
    this.again = button('Try again', () => actions.retry(view, this));
    this.actions = make('div', { class: 'line small' }, this.again, this.tokens, button('As curl', () => actions.curl(answer)), this.adoption);
    this.element = make('div', { role: 'group', class: `card c${column + 1}`, 'aria-label': `Answer ${column + 1}, ${answer.model}`, 'data-state': 'waiting' },
      make('h4', {}, make('span', { class: 'badge' }, `${column + 1}`), ' ', answer.model),
      this.text, this.problem, this.facts, this.difference, this.actions);
    this.element.append(this.under);
    this.update();
  }

  async run(signal) {
    const node = document.createTextNode('');
    this.text.replaceChildren(node);
    let waiting = '';
    const flush = () => { node.appendData(waiting); waiting = ''; };
    const done = this.answer.run(signal, piece => {
      if (!waiting) requestAnimationFrame(flush);
      waiting += piece;
      if (this.element.dataset.state !== 'running') this.update();
    });
    this.update();
    await done;
    flush();
    this.update();
    this.speak();
  }

  update() {
    const { state, failure, text } = this.answer;
    const runs = state === 'waiting' || state === 'running';
    this.element.dataset.state = state;
    this.element.setAttribute('aria-busy', String(runs));
    if (state === 'done' && text === '') this.text.replaceChildren(make('span', { class: 'soft' }, '(nothing)'));
    this.problem.hidden = !failure;
    this.problem.textContent = failure?.message ?? '';
    this.facts.textContent = this.said();
    this.again.hidden = runs || state === 'done';
    this.adoption.hidden = !this.answer.usable;
    this.actions.hidden = runs;
  }

  // What is known of the answer, in one line.
  said() {
    const { state, finish, usage, firstMs, tokensPerSecond } = this.answer;
    if (state === 'waiting') return 'waiting for the first word…';
    if (state === 'running') return 'answering…';
    const facts = [];
    if (state === 'stopped') facts.push('stopped');
    if (state === 'done' && finish) facts.push(ENDS[finish] ?? finish);
    if (usage) facts.push(`${plural(usage.completion_tokens, 'token')} (prompt ${number(usage.prompt_tokens)})`);
    if (firstMs) facts.push(`first after ${number(firstMs)} ms`);
    if (tokensPerSecond) facts.push(`${number(tokensPerSecond, 1)} tokens/s`);
    return facts.join(' · ');
  }

  speak() {
    const { state, text, failure, model } = this.answer;
    const end = state === 'failed' ? `failed: ${failure.message}` : `${state === 'stopped' ? 'stopped' : 'answers'}: ${text || 'nothing'}`;
    say(`${this.column + 1}, ${model}, ${end}`);
  }

  plain() {
    if (this.answer.text) this.text.replaceChildren(this.answer.text);
    this.difference.hidden = true;
  }

  // The answer with marks; `twin` is a card with the same answer.
  show(runs, twin) {
    this.text.replaceChildren(...runs.flatMap(({ same, text }) => (same ? [text] : marked(text))));
    const count = same => runs.filter(run => run.same === same).reduce((sum, run) => sum + run.words, 0);
    const own = count(false), all = own + count(true);
    this.difference.hidden = false;
    this.difference.textContent = twin ? `the same answer as ${twin.column + 1}` : lonely(own, all);
  }

  async toggleTokens() {
    const open = this.under.hidden;
    if (open && !this.under.hasChildNodes()) {
      try {
        this.under.replaceChildren(await promptAsTokens(this.answer));
      } catch (failure) {
        return this.view.actions.fail(failure);
      }
    }
    this.under.hidden = !open;
    this.tokens.setAttribute('aria-expanded', String(open));
  }
}
