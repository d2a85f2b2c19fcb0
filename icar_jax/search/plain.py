"""Plain captions of everyday scenes, used as background texts; see icar_jax.search.background."""

from __future__ import annotations

PLAIN = tuple(
    line.strip()
    for line in """
A man in a blue shirt.
A woman with long hair smiling at the camera.
Two children playing on the grass.
A baby asleep in a crib.
An old couple sitting on a bench.
A crowd of people at a concert.
A group of friends around a table.
A person riding a bicycle down the street.
A runner crossing the finish line.
A football player kicking a ball.
A surfer on a wave.
Someone climbing a rock wall.
A skier going down a snowy slope.
A dancer on a stage.
A man playing the guitar.
A chef cooking in a kitchen.
A doctor with a patient.
A worker on a building site.
A bride and groom at a wedding.
A portrait of a man with a beard.
A brown dog running through water.
Two dogs playing with a stick.
A cat asleep on a sofa.
A white horse in a field.
Cows behind a fence.
A flock of sheep on a hill.
A bird on a branch.
Ducks on a pond.
A butterfly on a flower.
Fish in an aquarium.
An elephant near a tree.
A lion lying in the grass.
A snake on the sand.
A spider in its web.
A beach with palm trees.
Mountains covered with snow.
A lake at sunset.
A path through a forest.
A waterfall between rocks.
A field of yellow flowers.
A desert under a blue sky.
Waves breaking on a rocky coast.
A river under a bridge.
A starry sky at night.
Clouds seen from an aeroplane.
Rain on a window.
A garden with roses.
A single tree on a hill.
A street with parked cars.
A skyline of tall buildings.
A church with a high tower.
A small house with a red roof.
A castle on a hill.
An empty room with white walls.
A living room with a sofa and a lamp.
A kitchen with wooden cupboards.
A bathroom with a sink and a mirror.
A bed with white pillows.
An office with desks and computers.
A classroom full of pupils.
A shop window with clothes.
A market with fruit and vegetables.
A restaurant with empty tables.
A library with shelves of books.
A staircase seen from above.
A red car on the road.
A yellow taxi in the city.
A bus at a stop.
A train in a station.
A motorcycle in a garage.
An aeroplane on a runway.
A boat on the sea.
A lorry on the motorway.
A tractor in a field.
A helicopter in the air.
A plate of pasta with tomato sauce.
A pizza on a wooden table.
A bowl of soup.
A salad with cheese.
A slice of chocolate cake.
A cup of coffee.
A glass of red wine.
A basket of apples.
Bread on a cutting board.
Sushi on a black plate.
A laptop on a desk.
A mobile phone in a hand.
A television in a dark room.
A camera on a tripod.
A clock on the wall.
A pair of shoes.
A wooden chair.
A vase with flowers.
A stack of old books.
A pair of glasses.
Keys on a table.
A toy train.
A teddy bear on a bed.
An umbrella in the rain.
A candle in the dark.
A page of printed text.
A handwritten letter.
An invoice with a table of amounts.
A screenshot of a web page.
A map of a city.
A bar chart with labels.
A diagram with arrows.
A company logo on a white background.
A road sign.
A poster for a film.
A painting of a landscape.
A drawing made by a child.
A black and white photograph.
A blurred photograph.
A cartoon character.
A sculpture in a museum.
Graffiti on a brick wall.
A tattoo on an arm.
A pattern of coloured shapes.
A plain white background.
A texture of wood.
A satellite image of land.
An X-ray of a hand.
A cell under a microscope.
Fireworks over a city.
A Christmas tree with lights.
A flag in the wind.
""".strip().splitlines()
)
