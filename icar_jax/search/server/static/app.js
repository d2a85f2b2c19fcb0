// Page behaviour. The search is stored in the URL, so that it can be shared and the back button works.

import * as view from '/static/view.js';

const { $ } = view;
const FILTER_DELAY_MS = 200;

let exits = [];
let limits = null;
let answer = { hits: [] };
const uploads = []; // {blob, name, url} of chosen images; history.state stores their index, as the URL cannot hold them
let running = null; // AbortController of the current search
let shown = -1; // index of the enlarged hit

const wanted = () => new URLSearchParams(location.search);
// Id of the query image of the store, from the URL; invalid ids are ignored.
const likeOf = (params) => (view.isImageId(params.get('like')) ? params.get('like') : null);
const chosenImage = () => uploads[history.state?.upload] || null;

function readControls(params) {
  const low = Number($('low').value);
  const high = Number($('high').value);
  if (low > 0) params.set('min', low);
  if (high < 1) params.set('max', high);
  if ($('count').value !== '24') params.set('k', $('count').value);
  for (const box of $('exits').querySelectorAll('input:checked')) params.append('exit', box.value);
  return params;
}

function writeControls(params) {
  $('query').value = params.get('q') || '';
  $('low').value = params.get('min') ?? 0;
  $('high').value = params.get('max') ?? 1;
  view.range(Number($('low').value), Number($('high').value));
  const count = params.get('k') || '24';
  if ([...$('count').options].some((each) => each.value === count)) $('count').value = count;
  const chosen = params.getAll('exit');
  for (const box of $('exits').querySelectorAll('input')) box.checked = chosen.includes(box.value);
}

function apiParams(params) {
  const asked = new URLSearchParams({ k: $('count').value });
  if (params.has('min')) asked.set('min_complexity', params.get('min'));
  if (params.has('max')) asked.set('max_complexity', params.get('max'));
  for (const exit of params.getAll('exit')) asked.append('exit', exit);
  if (params.has('exact')) asked.set('exact', 'true');
  return asked;
}

// Starts a new search and adds it to the history.
function go(params, image = null) {
  const address = params.toString() ? `?${params}` : location.pathname;
  history.pushState(image ? { upload: uploads.indexOf(image) } : null, '', address);
  run();
}

function submit() {
  const params = new URLSearchParams();
  const query = $('query').value.trim();
  if (query) params.set('q', query);
  else if (likeOf(wanted())) params.set('like', likeOf(wanted()));
  go(readControls(params), query ? null : chosenImage());
}

let filterTimer = 0;
function filtered() {
  clearTimeout(filterTimer);
  filterTimer = setTimeout(() => {
    const now = wanted();
    const params = new URLSearchParams();
    for (const key of ['q', 'like', 'exact']) if (now.has(key)) params.set(key, now.get(key));
    go(readControls(params), chosenImage());
  }, FILTER_DELAY_MS);
}

async function run() {
  running?.abort();
  const mine = new AbortController();
  running = mine;
  const params = wanted();
  const [query, like, upload] = [params.get('q'), likeOf(params), chosenImage()];
  document.title = query ? `${query} · icar search` : 'icar search';
  const source = like && !query ? view.thumbnail({ id: like }) : upload && !query ? upload.url : '';
  view.chip(source ? upload?.name || 'a result' : '', source);
  if (!query && !like && !upload) {
    view.clear();
    answer = { hits: [] };
    $('start').hidden = false;
    if (params.has('like')) view.notice('Invalid image', 'The link asks for similar images, but its image id is invalid.');
    return;
  }
  view.notice();
  const patience = setTimeout(() => view.loading(Number($('count').value)), 120);
  try {
    const asked = apiParams(params);
    let response;
    if (query) {
      asked.set('q', query);
      response = await fetch(`/api/search?${asked}`, { signal: mine.signal });
    } else {
      response = await searchImage(asked, like, upload, mine.signal);
    }
    if (response.status === 401) {
      location.reload(); // redirects to the login
      return;
    }
    if (!response.ok) throw new Error(await view.reason(response));
    answer = await response.json();
    clearTimeout(patience);
    view.results(answer, exits);
    explain();
  } catch (error) {
    if (error.name === 'AbortError') return;
    clearTimeout(patience);
    view.clear();
    $('status').textContent = 'The search failed.';
    const gone = error instanceof TypeError; // fetch throws it if there is no response
    view.notice('The search failed', gone ? 'The server does not respond. Is it still running?' : error.message, run);
  } finally {
    clearTimeout(patience);
  }
}

async function searchImage(asked, like, image, signal) {
  if (like) {
    const picture = await fetch(view.thumbnail({ id: like }, 1280), { signal });
    if (!picture.ok) return picture;
    image = { blob: await picture.blob(), name: 'image.jpg' };
  }
  const form = new FormData();
  form.append('image', image.blob, image.name);
  return fetch(`/api/search/image?${asked}`, { method: 'POST', body: form, signal });
}

function explain() {
  const filtering = ['min', 'max', 'exit'].some((key) => wanted().has(key));
  if (!answer.hits.length) {
    view.notice(
      filtering ? 'No image passes the filters' : 'The store is empty',
      filtering ? 'Widen the complexity range, or choose other exits.' : 'Add images with `icar index`; they can be searched at once.',
    );
  } else if (answer.verdict.nothing_here) {
    view.notice('Nothing here seems to match', 'No image is clearly closer to this query than expected by chance. The nearest ones are shown anyway.');
  } else if (answer.truncated) {
    view.notice('The query was truncated', 'It exceeds the context length of the model; only the beginning was used.');
  }
}

function take(file) {
  if (!file) return;
  if (!file.type.startsWith('image/')) {
    view.notice('Not an image', `${file.name || 'This file'} is not an image; choose an image file.`);
    return;
  }
  if (limits && file.size > limits.upload_bytes) {
    const limit = Math.round(limits.upload_bytes / 1e6);
    view.notice('The image is too large', `${file.name} has ${Math.round(file.size / 1e6)} MB; the limit of this server is ${limit} MB.`);
    return;
  }
  uploads.push({ blob: file, name: file.name || 'pasted image', url: URL.createObjectURL(file) });
  $('query').value = '';
  go(readControls(new URLSearchParams()), uploads.at(-1));
}

// Keyboard navigation of the grid: Tab enters it, arrow keys move within.
const cards = () => [...$('results').querySelectorAll('.card')];

function columns(all) {
  const top = all[0].getBoundingClientRect().top;
  const next = all.findIndex((each) => each.getBoundingClientRect().top > top + 1);
  return next < 0 ? all.length : next;
}

function focusCard(i) {
  const all = cards();
  const to = all[Math.max(0, Math.min(all.length - 1, i))];
  if (!to) return;
  for (const each of all) each.tabIndex = each === to ? 0 : -1;
  to.focus();
}

$('results').addEventListener('keydown', (event) => {
  const all = cards();
  const at = all.indexOf(document.activeElement);
  if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(all), ArrowUp: -columns(all) }[event.key];
  let to = step === undefined ? null : at + step;
  if (event.key === 'Home') to = 0;
  if (event.key === 'End') to = all.length - 1;
  if (to === null) return;
  event.preventDefault();
  if (to < 0 && event.key === 'ArrowUp') $('query').focus();
  else if (to < all.length || event.key !== 'ArrowDown') focusCard(to);
  else focusCard(all.length - 1);
});

$('results').addEventListener('click', (event) => {
  const button = event.target.closest('.card');
  if (button) enlarge(Number(button.dataset.index));
});

function enlarge(i) {
  if (i < 0 || i >= answer.hits.length) return;
  shown = i;
  view.enlarged(answer.hits[i], i, answer.hits, exits);
  if (!$('viewer').open) $('viewer').showModal();
}

$('viewer').addEventListener('close', () => focusCard(shown));
$('viewer').addEventListener('click', (event) => {
  if (event.target === $('viewer')) $('viewer').close(); // the backdrop
});
addEventListener('keydown', (event) => {
  if (!$('viewer').open) return;
  if (event.key === 'ArrowLeft') enlarge(shown - 1);
  if (event.key === 'ArrowRight') enlarge(shown + 1);
});
$('viewer-close').addEventListener('click', () => $('viewer').close());
$('viewer-before').addEventListener('click', () => enlarge(shown - 1));
$('viewer-after').addEventListener('click', () => enlarge(shown + 1));
$('viewer-picture').addEventListener('error', async () => {
  const hit = answer.hits[shown];
  const why = await view.reason(await fetch(view.thumbnail(hit, 1280)).catch(() => null));
  $('viewer-picture').hidden = true;
  $('viewer-broken').hidden = false;
  $('viewer-broken').textContent = why;
});
$('viewer-like').addEventListener('click', () => {
  const { id } = answer.hits[shown];
  $('viewer').close();
  $('query').value = '';
  go(readControls(new URLSearchParams({ like: id })));
  scrollTo({ top: 0 });
});

$('search').addEventListener('submit', (event) => {
  event.preventDefault();
  submit();
});
$('query').addEventListener('keydown', (event) => {
  if (event.key === 'ArrowDown' && cards().length) {
    event.preventDefault();
    focusCard(cards().findIndex((each) => each.tabIndex === 0));
  }
});
$('file').addEventListener('change', () => {
  take($('file').files[0]);
  $('file').value = '';
});
$('chip-remove').addEventListener('click', () => {
  go(readControls(new URLSearchParams()));
  $('query').focus();
});
for (const [id, other] of [['low', 'high'], ['high', 'low']]) {
  $(id).addEventListener('input', () => {
    const [low, high] = [Number($('low').value), Number($('high').value)];
    if (low > high) $(id).value = $(other).value;
    view.range(Number($('low').value), Number($('high').value));
  });
  $(id).addEventListener('change', filtered);
}
$('count').addEventListener('change', filtered);
$('exits').addEventListener('change', filtered);
addEventListener('popstate', () => {
  writeControls(wanted());
  run();
});
addEventListener('keydown', (event) => {
  if (event.key !== '/' || event.target.closest('input, select, dialog')) return;
  event.preventDefault();
  $('query').focus();
  $('query').select();
});
addEventListener('paste', (event) => {
  const file = [...(event.clipboardData?.files || [])].find((each) => each.type.startsWith('image/'));
  if (!file) return;
  event.preventDefault();
  take(file);
});

let depth = 0; // number of open dragenter events; every element under the pointer sends one
const dragged = (event) => event.dataTransfer?.types.includes('Files');
addEventListener('dragenter', (event) => {
  if (dragged(event)) $('drop').hidden = ++depth < 1;
});
addEventListener('dragleave', (event) => {
  if (dragged(event)) $('drop').hidden = --depth < 1;
});
addEventListener('dragover', (event) => {
  if (dragged(event)) event.preventDefault();
});
addEventListener('drop', (event) => {
  if (!dragged(event)) return;
  event.preventDefault();
  depth = 0;
  $('drop').hidden = true;
  take(event.dataTransfer.files[0]);
});

async function start() {
  writeControls(wanted());
  const response = await fetch('/api/store').catch(() => null);
  if (response?.ok) {
    const info = await response.json();
    exits = info.exits.map((each) => each.exit);
    limits = info.limits;
    view.store(info);
    writeControls(wanted());
    if (!info.scored) $('range-text').textContent = 'not scored';
  } else {
    view.notice('The store cannot be read', await view.reason(response), () => location.reload());
    return;
  }
  run();
}

start();
