// Rendering of the page. External text is always inserted as text, never as HTML.

export const $ = (id) => document.getElementById(id);

export function element(tag, classes = '', text = null) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  if (text !== null) made.textContent = text;
  return made;
}

const number = new Intl.NumberFormat('en');
const share = (part) => `${part > 0 && part < 0.01 ? '<1' : Math.round(100 * part)}%`;
const milliseconds = (ms) => (ms < 10 ? ms.toFixed(1) : String(Math.round(ms)));
const plural = (n, one) => `${number.format(n)} ${one}${n === 1 ? '' : 's'}`;

const score3 = (score) => (score < 0.0005 ? '<0.001' : score.toFixed(3));
const firstLine = (text) => (text || '').trim().split('\n')[0];

export const isImageId = (text) => /^[0-9a-f]{64}$/.test(text);

export const thumbnail = (hit, size = 320) => `/api/images/${hit.id}/thumbnail?size=${size}`;

function part(node, value) {
  node.style.setProperty('--part', value);
  return node;
}

function meter(value) {
  const bar = element('span', 'meter');
  bar.setAttribute('aria-hidden', 'true');
  bar.append(part(element('i'), value));
  return bar;
}

function pips(exit, exits) {
  const row = element('span', 'pips');
  row.setAttribute('aria-hidden', 'true');
  for (const each of exits) row.append(element('i', each <= exit ? 'on' : ''));
  return row;
}

const complexityText = (hit) => (hit.complexity === null ? 'not scored' : hit.complexity.toFixed(2));

// Shows the reason if an image fails to load; retries once if the server was busy.
function fill(frame, source, alt, size = {}) {
  const image = Object.assign(element('img'), { alt, loading: 'lazy', decoding: 'async', ...size });
  image.addEventListener('error', async () => {
    const answer = await fetch(source).catch(() => null);
    if (answer && (answer.ok || answer.status === 503) && !image.dataset.again) {
      image.dataset.again = '1';
      setTimeout(() => { image.src = `${source}&again=1`; }, 1500);
      return;
    }
    image.replaceWith(element('span', 'gone', await reason(answer)));
  });
  image.src = source;
  frame.prepend(image);
}

// One line with the reason for a failed response.
export async function reason(answer) {
  if (!answer) return 'The server does not respond. Is it still running?';
  try {
    return (await answer.json()).detail || `The server returned status ${answer.status}.`;
  } catch {
    return `The server returned status ${answer.status}.`;
  }
}

function card(hit, i, exits) {
  const item = element('li');
  const button = element('button', 'card');
  button.type = 'button';
  button.dataset.index = i;
  button.tabIndex = i ? -1 : 0;
  const frame = element('span', 'frame');
  fill(frame, thumbnail(hit), hit.caption || hit.name, { width: 320, height: 240 });
  frame.append(element('span', 'rank', String(i + 1)));
  const facts = element('span', 'facts');
  const name = element('span', 'name', firstLine(hit.caption) || hit.name);
  name.title = hit.path;
  const complexity = element('span', 'pair');
  complexity.append(element('span', '', 'complexity'));
  if (hit.complexity !== null) complexity.append(meter(hit.complexity));
  complexity.append(element('b', '', complexityText(hit)));
  const depth = element('span', 'pair');
  const exit = element('span', '', `exit ${hit.exit}`);
  exit.append(pips(hit.exit, exits));
  const score = element('span', '', 'score ');
  score.append(element('b', '', score3(hit.score)));
  score.title = `cosine ${hit.cosine.toFixed(3)}, by which results are ranked; the score is comparable between queries`;
  depth.append(exit, score);
  facts.append(name, complexity, depth);
  button.append(frame, facts);
  item.append(button);
  return item;
}

export function results(answer, exits) {
  const grid = $('results');
  grid.classList.remove('old');
  grid.removeAttribute('aria-busy');
  grid.replaceChildren(...answer.hits.map((hit, i) => card(hit, i, exits)));
  const ms = answer.latency_ms;
  const status = $('status');
  const parts = [['queue', ms.queue], ['decode', ms.decode], ['encode', ms.encode], ['search', ms.search]];
  const slow = parts.filter(([name, value]) => value >= 0.05 && (name !== 'queue' || value >= 1));
  status.replaceChildren(
    element('b', '', plural(answer.hits.length, 'result')),
    ` in ${milliseconds(ms.total)} ms`,
    slow.length ? ` (${slow.map(([name, value]) => `${name} ${milliseconds(value)}`).join(', ')})` : '',
  );
  $('start').hidden = true;
}

export function loading(count) {
  const grid = $('results');
  grid.setAttribute('aria-busy', 'true');
  $('start').hidden = true;
  $('status').textContent = 'Searching …';
  if (grid.children.length && !grid.querySelector('.ghost')) {
    grid.classList.add('old');
    return;
  }
  const ghosts = Array.from({ length: Math.min(count, 12) }, () => {
    const ghost = element('li', 'ghost');
    ghost.setAttribute('aria-hidden', 'true');
    ghost.append(element('span', 'frame'));
    return ghost;
  });
  grid.replaceChildren(...ghosts);
}

export function clear() {
  const grid = $('results');
  grid.replaceChildren();
  grid.classList.remove('old');
  grid.removeAttribute('aria-busy');
  $('status').textContent = '';
  notice();
}

// Shows a message above the results: `title` in bold, `again` is called by its button.
export function notice(title = '', text = '', again = null) {
  const box = $('notice');
  box.hidden = !title;
  box.replaceChildren();
  if (!title) return;
  box.append(element('strong', '', title), element('span', '', text));
  if (again) {
    const button = element('button', '', 'Try again');
    button.type = 'button';
    button.addEventListener('click', again);
    box.append(element('br'), button);
  }
}

export function store(info) {
  const scored = info.scored ? `, ${share(info.scored / info.images)} with a complexity score` : '';
  $('about').textContent = `${plural(info.images, 'image')}${info.scored < info.images ? scored : ''}`;
  $('complexity').disabled = !info.scored;
  if (!info.scored) $('range-text').textContent = 'not scored';
  const exits = $('exits');
  exits.querySelectorAll('label').forEach((label) => label.remove());
  exits.hidden = info.exits.length < 2;
  for (const { exit, images } of info.exits) {
    const label = element('label');
    const box = Object.assign(element('input'), { type: 'checkbox', value: exit, name: 'exit' });
    box.setAttribute('aria-label', `Exit after ${exit} blocks, ${plural(images, 'image')}`);
    label.append(box, element('span', '', String(exit)));
    exits.append(label);
  }
  const used = info.exits.filter((each) => each.images);
  $('depths').hidden = used.length < 1 || info.exits.length < 2;
  $('stack').replaceChildren(...info.exits.filter((each) => each.images).map((each) => {
    const piece = part(element('i'), each.share);
    const place = info.exits.indexOf(each) + 1;
    piece.style.setProperty('--shade', 0.35 + (0.65 * place) / info.exits.length);
    return piece;
  }));
  $('depths-list').replaceChildren(...info.exits.map((each) =>
    element('li', '', `exit ${each.exit}: ${share(each.share)} (${number.format(each.images)})`)));
}

export function range(low, high) {
  const any = low <= 0 && high >= 1;
  $('range-text').textContent = any ? 'any' : `${low.toFixed(2)} to ${high.toFixed(2)}`;
  $('range').style.setProperty('--low', low);
  $('range').style.setProperty('--high', high);
}

export function chip(name, source) {
  $('chip').hidden = !name;
  $('query').placeholder = name ? 'or describe an image instead' : 'Describe an image';
  if (name) {
    $('chip-name').textContent = name;
    $('chip-picture').src = source;
  } else {
    $('chip-picture').removeAttribute('src');
  }
}

export function enlarged(hit, i, all, exits) {
  $('viewer-name').textContent = hit.name;
  $('viewer-caption').textContent = hit.caption || '';
  $('viewer-caption').hidden = !hit.caption;
  $('viewer-original').href = `/api/images/${hit.id}`;
  $('viewer-before').disabled = i === 0;
  $('viewer-after').disabled = i === all.length - 1;
  const picture = $('viewer-picture');
  $('viewer-broken').hidden = true;
  picture.hidden = false;
  picture.alt = hit.caption || hit.name;
  picture.src = thumbnail(hit, 1280);
  const facts = $('viewer-facts');
  facts.replaceChildren();
  const add = (what, ...values) => {
    const value = element('dd');
    value.append(...values);
    facts.append(element('dt', '', what), value);
    return value;
  };
  add('Rank', `${i + 1} of ${all.length}`);
  add('Score', score3(hit.score));
  add('Cosine', hit.cosine.toFixed(3));
  add('Complexity', ...(hit.complexity === null ? [] : [meter(hit.complexity)]), complexityText(hit));
  add('Exit', `${hit.exit} of ${exits.at(-1)} blocks`, pips(hit.exit, exits));
  add('Path', hit.path).className = 'wide';
}
